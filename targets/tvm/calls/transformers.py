"""Kernel calls for the units of transformers (`units_tokens.py`)."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import onnx_ir as ir

from dvexport.dialect.spec import operator_of
from dvexport.graph.graph import static_shape
from dvexport.targets.tvm.calls.program import FLOAT_BYTES, Program
from dvexport.targets.tvm.kernels.tokens import attention, matmul, tokens
from dvexport.targets.tvm.kernels.tokens.attention import Bias, Sizes, Strides
from dvexport.targets.tvm.kernels.tokens.window_attention import WindowBias, window_attention, window_shape
from dvexport.targets.tvm.machine.dtype import dtype_of
from dvexport.targets.tvm.units.transformers import AttentionUnit, LinearUnit, ViewUnit
from dvexport.targets.tvm.units.unit import Unit
from dvexport.targets.tvm.units.views import View, view_of

__all__ = ["TOKEN_RULES"]

_PLAIN_BIASES = 2
_EPSILON = 1e-5
"""LayerNormalization's, where it gives none."""


def _linear(program: Program, unit: Unit) -> None:
    assert isinstance(unit, LinearUnit)
    inputs, outputs = unit.weight.shape
    rows, machine = prod(static_shape(unit.x)[:-1]), program.machine
    spec = matmul.MatMul(unit.activation, unit.residual is not None)
    bias = np.zeros(outputs, np.float32) if unit.bias is None else unit.bias
    arguments = [
        program.flat(unit.x),
        program.constants.add(matmul.matmul_weights(unit.weight, machine), of=unit.weight),
        program.constants.add(matmul.matmul_bias(bias, machine), of=bias),
        *([program.flat(unit.residual)] if unit.residual is not None else []),
        program.scratch(matmul.matmul_scratch(program.threads, machine)),
        program.constants.add(matmul.matmul_shape(rows, inputs, outputs, machine)),
        program.new_flat(unit.output),
    ]
    program.call(matmul.matmul(spec, machine), arguments, _label(unit), unit.gate)


def _attention(program: Program, unit: Unit) -> None:
    assert isinstance(unit, AttentionUnit) and unit.v is not None
    batches, heads = _leading(unit.q, unit.k, unit.v)
    queries, keys, depth, width = unit.q.shape[-2], unit.k.shape[-2], unit.q.shape[-1], unit.v.shape[-1]
    sizes = Sizes(batches, heads, queries, keys, depth, width)
    spec = attention.attention_spec(width, len(unit.biases), program.machine)
    row = heads * width if unit.tokens_first else width
    head = width if unit.tokens_first else queries * width
    result = Strides(0, queries * heads * width, head, row)
    strides = (_strides(unit.q), _strides(unit.k), _strides(unit.v), result)
    plain = _plain_biases(unit, sizes)
    if plain is not None:
        kernel = attention.attention(spec, program.machine)
        shape = attention.attention_shape(sizes, strides, plain, spec, program.machine)
    else:
        biases = tuple(WindowBias(each.parts, each.part, each.head, each.row) for each in unit.biases)
        kernel = window_attention(spec, program.machine)
        shape = window_shape(sizes, strides, biases, spec, program.machine)
    made, *others = unit.outputs
    arguments = [
        *(program.flat(view.base) for view in (unit.q, unit.k, unit.v)),
        *(program.flat(each.value) for each in unit.biases),
        program.constants.add(np.array([unit.scale], np.float32)),
        program.scratch(attention.attention_scratch(program.threads, sizes, spec, program.machine)),
        program.constants.add(shape),
        program.new_flat(made),
    ]
    program.call(kernel, arguments, _label(unit), unit.gate)
    for value in others:  # the same, before or after the reshape that joins the heads
        program.share(value, arguments[-1], flat=True)


def _plain_biases(unit: AttentionUnit, sizes: Sizes) -> tuple[Bias, ...] | None:
    """Return biases whose rows are dense and whose parts come in turn, None if some are not of that kind."""
    made = []
    for each in unit.biases:
        period = 1 if not any(each.parts) else len(each.parts)
        if each.row != sizes.keys or each.parts != tuple(batch % period for batch in range(sizes.batches)):
            return None
        made.append(Bias(period, each.part, each.head))
    return tuple(made) if len(made) <= _PLAIN_BIASES else None


def _product(program: Program, unit: Unit) -> None:
    assert isinstance(unit, AttentionUnit)
    batches, heads = _leading(unit.q, unit.k)
    queries, keys, depth = unit.q.shape[-2], unit.k.shape[-2], unit.q.shape[-1]
    sizes, spec = Sizes(batches, heads, queries, keys, depth, 0), attention.Attention(1, softmax=False)
    result = Strides(0, heads * queries * keys, queries * keys, keys)
    strides = (_strides(unit.q), _strides(unit.k), result)
    arguments = [
        program.flat(unit.q.base),
        program.flat(unit.k.base),
        program.constants.add(np.array([unit.scale], np.float32)),
        program.scratch(attention.attention_scratch(program.threads, sizes, spec, program.machine)),
        program.constants.add(attention.attention_shape(sizes, strides, (), spec, program.machine)),
        program.new_flat(unit.output),
    ]
    program.call(attention.attention(spec, program.machine), arguments, _label(unit), unit.gate)


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


def _layer_norm(program: Program, unit: Unit) -> None:
    node, machine = unit.nodes[0], program.machine
    x, weight, bias = node.inputs
    assert x is not None and weight is not None and bias is not None
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else _EPSILON
    *leading, columns = static_shape(x)
    arguments = [
        program.flat(x),
        program.flat(weight),
        program.flat(bias),
        program.constants.add(np.array([epsilon], np.float32)),
        program.constants.add(tokens.layer_norm_shape(prod(leading), columns)),
        program.new_flat(unit.output),
    ]
    program.call(tokens.layer_norm(machine), arguments, _label(unit), unit.gate)


def _select_tokens(program: Program, unit: Unit) -> None:
    node = unit.nodes[0]
    operator = operator_of(node)
    assert operator is not None
    inputs, keep = operator.bind(node), operator.attributes_of(node)["keep"]
    x, score = inputs["X"], inputs["score"]
    assert x is not None and score is not None
    batches, count, channels = static_shape(x)
    kept, index = node.outputs
    index.type = ir.TensorType(ir.DataType.INT64)
    for value, shape in ((kept, [batches, keep, channels]), (index, [batches, keep])):
        if value.shape is None:
            value.shape = ir.Shape(shape)
    arguments = [
        program.flat(x),
        program.flat(score),
        program.constants.add(tokens.select_shape(batches, count, channels, int(keep))),
        program.new_flat(index),
        program.new_flat(kept),
    ]
    program.call(tokens.select_tokens(program.machine), arguments, _label(unit), unit.gate)


def _scatter(program: Program, unit: Unit) -> None:
    x, index, updates = unit.nodes[0].inputs
    assert x is not None and index is not None and updates is not None and x.dtype is not None
    *leading, count = static_shape(x)
    arguments = [
        program.flat(x),
        program.flat(index),
        program.flat(updates),
        program.constants.add(tokens.scatter_shape(prod(leading), count, static_shape(index)[-1])),
        program.new_flat(unit.output),
    ]
    program.call(tokens.scatter(dtype_of(x.dtype.numpy())), arguments, _label(unit), unit.gate)


def _view(program: Program, unit: Unit) -> None:
    """Parts of what is there already: nothing is moved."""
    assert isinstance(unit, ViewUnit)
    whole = program.flat(unit.view.base)
    for value in unit.nodes[0].outputs:
        view = view_of(value)
        size = prod(view.shape) * FLOAT_BYTES
        program.share(value, whole.part(view.offset * FLOAT_BYTES, size), flat=True)


TOKEN_RULES: dict[str, Callable[[Program, Unit], None]] = {
    "linear": _linear,
    "attention": _attention,
    "product": _product,
    "layer_norm": _layer_norm,
    "select_tokens": _select_tokens,
    "scatter": _scatter,
    "view": _view,
}


def _label(unit: Unit) -> str:
    """What a profile calls it."""
    return f"{unit.kind} {unit.outputs[0].name if unit.outputs else ''}".strip()
