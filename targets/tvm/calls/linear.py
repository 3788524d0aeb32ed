"""Calls of linear layers: products with constant matrices, of many rows and of few."""

from __future__ import annotations

from math import prod

import numpy as np

from dvexport.graph.graph import array_of, static_shape
from dvexport.graph.match import made_by
from dvexport.targets.tvm.calls.draft import Draft
from dvexport.targets.tvm.calls.memory import scratch
from dvexport.targets.tvm.calls.writers import Writers, label_of
from dvexport.targets.tvm.kernels.tokens import dense, matmul
from dvexport.targets.tvm.units.linear import LinearUnit
from dvexport.targets.tvm.units.unit import Unit

__all__ = ["WRITERS"]

WRITERS = Writers()


@WRITERS.writes("linear", LinearUnit)
def _linear(draft: Draft, unit: LinearUnit) -> None:
    inputs, outputs = unit.weight.shape
    rows, machine = prod(static_shape(unit.x)[:-1]), draft.machine
    spec = matmul.MatMul(unit.activation, unit.residual is not None)
    bias = np.zeros(outputs, np.float32) if unit.bias is None else unit.bias
    arguments = [
        draft.flat(unit.x),
        draft.constants.add(matmul.matmul_weights(unit.weight, machine), of=unit.weight),
        draft.constants.add(matmul.matmul_bias(bias, machine), of=bias),
        *([draft.flat(unit.residual)] if unit.residual is not None else []),
        scratch(matmul.matmul_scratch(draft.threads, machine)),
        draft.constants.add(matmul.matmul_shape(rows, inputs, outputs, machine)),
        draft.new_flat(unit.output),
    ]
    draft.calls.call(matmul.matmul(spec, machine), arguments, label_of(unit), unit.gate)


@WRITERS.writes("gemm", Unit)
def _gemm(draft: Draft, unit: Unit) -> None:
    node, machine = unit.nodes[0], draft.machine
    weight, bias = array_of(node.inputs[1]), array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    assert weight is not None and node.inputs[0] is not None
    outputs, inputs = weight.shape
    rows = static_shape(node.inputs[0])[0]
    skips = rows == 1 and made_by(node.inputs[0], "Relu") is not None
    spec = dense.dense_spec(outputs, machine, relu=len(unit.nodes) > 1, skips=skips)
    given = np.zeros(outputs, np.float32) if bias is None else bias
    arguments = [
        draft.flat(node.inputs[0]),
        draft.constants.add(dense.dense_weights(weight, spec, machine), of=weight.T),
        draft.constants.add(dense.dense_bias(given, spec, machine), of=given),
        *([scratch(dense.dense_scratch(inputs, draft.threads))] if skips else []),
        draft.constants.add(dense.dense_shape(rows, outputs, inputs)),
        draft.new_flat(unit.output),
    ]
    draft.calls.call(dense.dense(spec, machine), arguments, label_of(unit), unit.gate)
