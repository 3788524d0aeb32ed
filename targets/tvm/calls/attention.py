"""Calls of attention and of products of two activations."""

from __future__ import annotations

import numpy as np

from dvexport.targets.tvm.calls.draft import Draft
from dvexport.targets.tvm.calls.memory import scratch
from dvexport.targets.tvm.calls.writers import Writers, label_of
from dvexport.targets.tvm.kernels.tokens import attention
from dvexport.targets.tvm.kernels.tokens.attention import Bias, Sizes, Strides
from dvexport.targets.tvm.kernels.tokens.window_attention import WindowBias, window_attention, window_shape
from dvexport.targets.tvm.units.attention import AttentionUnit
from dvexport.targets.tvm.units.views import View

__all__ = ["WRITERS"]

WRITERS = Writers()

_PLAIN_BIASES = 2


@WRITERS.writes("attention", AttentionUnit)
def _attention(draft: Draft, unit: AttentionUnit) -> None:
    assert unit.v is not None
    batches, heads = _leading(unit.q, unit.k, unit.v)
    queries, keys, depth, width = unit.q.shape[-2], unit.k.shape[-2], unit.q.shape[-1], unit.v.shape[-1]
    sizes = Sizes(batches, heads, queries, keys, depth, width)
    spec = attention.attention_spec(width, len(unit.biases), draft.machine)
    row = heads * width if unit.tokens_first else width
    head = width if unit.tokens_first else queries * width
    result = Strides(0, queries * heads * width, head, row)
    strides = (_strides(unit.q), _strides(unit.k), _strides(unit.v), result)
    plain = _plain_biases(unit, sizes)
    if plain is not None:
        kernel = attention.attention(spec, draft.machine)
        shape = attention.attention_shape(sizes, strides, plain, spec, draft.machine)
    else:
        biases = tuple(WindowBias(each.parts, each.part, each.head, each.row) for each in unit.biases)
        kernel = window_attention(spec, draft.machine)
        shape = window_shape(sizes, strides, biases, spec, draft.machine)
    made, *others = unit.outputs
    arguments = [
        *(draft.flat(view.base) for view in (unit.q, unit.k, unit.v)),
        *(draft.flat(each.value) for each in unit.biases),
        draft.constants.add(np.array([unit.scale], np.float32)),
        scratch(attention.attention_scratch(draft.threads, sizes, spec, draft.machine)),
        draft.constants.add(shape),
        draft.new_flat(made),
    ]
    draft.calls.call(kernel, arguments, label_of(unit, made), unit.gate)
    for value in others:  # the same, before or after the reshape that joins the heads
        draft.share(value, arguments[-1], flat=True)


def _plain_biases(unit: AttentionUnit, sizes: Sizes) -> tuple[Bias, ...] | None:
    """Return biases whose rows are dense and whose parts come in turn, None if some are not of that kind."""
    made = []
    for each in unit.biases:
        period = 1 if not any(each.parts) else len(each.parts)
        if each.row != sizes.keys or each.parts != tuple(batch % period for batch in range(sizes.batches)):
            return None
        made.append(Bias(period, each.part, each.head))
    return tuple(made) if len(made) <= _PLAIN_BIASES else None


@WRITERS.writes("product", AttentionUnit)
def _product(draft: Draft, unit: AttentionUnit) -> None:
    batches, heads = _leading(unit.q, unit.k)
    queries, keys, depth = unit.q.shape[-2], unit.k.shape[-2], unit.q.shape[-1]
    sizes, spec = Sizes(batches, heads, queries, keys, depth, 0), attention.Attention(1, softmax=False)
    result = Strides(0, heads * queries * keys, queries * keys, keys)
    strides = (_strides(unit.q), _strides(unit.k), result)
    arguments = [
        draft.flat(unit.q.base),
        draft.flat(unit.k.base),
        draft.constants.add(np.array([unit.scale], np.float32)),
        scratch(attention.attention_scratch(draft.threads, sizes, spec, draft.machine)),
        draft.constants.add(attention.attention_shape(sizes, strides, (), spec, draft.machine)),
        draft.new_flat(unit.output),
    ]
    draft.calls.call(attention.attention(spec, draft.machine), arguments, label_of(unit), unit.gate)


def _leading(*views: View) -> tuple[int, int]:
    """Return batches and heads, 1 where there is no such axis."""
    batches = max((view.shape[-4] if len(view.shape) > 3 else view.shape[0]) for view in views)
    if len(views[0].shape) == 2:
        return 1, 1
    return batches, max(view.shape[-3] for view in views) if len(views[0].shape) > 3 else 1


def _strides(view: View) -> Strides:
    """Return a view's strides as batches, heads, rows, columns."""
    batch, head = (view.axis(-4), view.axis(-3)) if len(view.shape) > 3 else (view.axis(-3), 0)
    return Strides(view.offset, batch, head, view.axis(-2), view.axis(-1) or 1)
