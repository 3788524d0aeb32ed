"""Calls of norms, of the choice of tokens, of single elements written, and of views, which need none."""

from __future__ import annotations

from math import prod

import numpy as np

from dvexport.dialect.spec import specification
from dvexport.graph.graph import static_shape
from dvexport.targets.tvm.calls.draft import Draft
from dvexport.targets.tvm.calls.memory import FLOAT_BYTES
from dvexport.targets.tvm.calls.writers import Writers, label_of
from dvexport.targets.tvm.kernels.tokens import tokens
from dvexport.targets.tvm.machine.dtype import dtype_of
from dvexport.targets.tvm.units.tokens import ViewUnit
from dvexport.targets.tvm.units.unit import Unit
from dvexport.targets.tvm.units.views import view_of

__all__ = ["WRITERS"]

WRITERS = Writers()

_EPSILON = 1e-5
"""LayerNormalization's, where it gives none."""


@WRITERS.writes("layer_norm", Unit)
def _layer_norm(draft: Draft, unit: Unit) -> None:
    node, machine = unit.nodes[0], draft.machine
    x, weight, bias = node.inputs
    assert x is not None and weight is not None and bias is not None
    epsilon = node.attributes.get_float("epsilon", _EPSILON)
    *leading, columns = static_shape(x)
    arguments = [
        draft.flat(x),
        draft.flat(weight),
        draft.flat(bias),
        draft.constants.add(np.array([epsilon], np.float32)),
        draft.constants.add(tokens.layer_norm_shape(prod(leading), columns)),
        draft.new_flat(unit.output),
    ]
    draft.calls.call(tokens.layer_norm(machine), arguments, label_of(unit), unit.gate)


@WRITERS.writes("select_tokens", Unit)
def _select_tokens(draft: Draft, unit: Unit) -> None:
    node = unit.nodes[0]
    operator = specification(node)
    inputs, keep = operator.bind(node), operator.attributes_of(node)["keep"]
    x, score = inputs["X"], inputs["score"]
    assert x is not None and score is not None
    batches, count, channels = static_shape(x)
    kept, index = node.outputs
    arguments = [
        draft.flat(x),
        draft.flat(score),
        draft.constants.add(tokens.select_shape(batches, count, channels, int(keep))),
        draft.new_flat(index),
        draft.new_flat(kept),
    ]
    draft.calls.call(tokens.select_tokens(draft.machine), arguments, label_of(unit, kept), unit.gate)


@WRITERS.writes("scatter", Unit)
def _scatter(draft: Draft, unit: Unit) -> None:
    x, index, updates = unit.nodes[0].inputs
    assert x is not None and index is not None and updates is not None and x.dtype is not None
    *leading, count = static_shape(x)
    arguments = [
        draft.flat(x),
        draft.flat(index),
        draft.flat(updates),
        draft.constants.add(tokens.scatter_shape(prod(leading), count, static_shape(index)[-1])),
        draft.new_flat(unit.output),
    ]
    draft.calls.call(tokens.scatter(dtype_of(x.dtype.numpy())), arguments, label_of(unit), unit.gate)


@WRITERS.writes("view", ViewUnit)
def _view(draft: Draft, unit: ViewUnit) -> None:
    """Parts of what is there already: nothing is moved."""
    whole = draft.flat(unit.view.base)
    for value in unit.nodes[0].outputs:
        view = view_of(value)
        size = prod(view.shape) * FLOAT_BYTES
        draft.share(value, whole.part(view.offset * FLOAT_BYTES, size), flat=True)
