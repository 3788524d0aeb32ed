"""Take the score of the first action off the others where a policy compares them.

A policy scores K actions for each channel by one linear layer and takes the largest. Only differences matter:

    argmax(s_0, s_1, s_2) = argmax(0, s_1 - s_0, s_2 - s_0)

and the difference of two linear forms is a linear form, so the weights are subtracted at export. A third (K = 3) or a
half (K = 2) of the layer's weights need not be read, and comparisons replace the maximum. The first action wins among
equal scores, as in ArgMax. Scores round differently, by as much as in any other order of summation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from dvexport.graph.graph import Builder, array_of, replace_node
from dvexport.graph.match import attributes_of, is_op, made_by

__all__ = ["FoldScores"]


class FoldScores(ir.passes.InPlacePass):
    """Rewrite Gemm, Reshape `[N, C, K]`, ArgMax over K, for K of 2 or 3. Requires: weights are constants."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every match; what scored all actions becomes dead code."""
        matches = [match for node in model.graph if (match := _match(node)) is not None]
        for match in matches:
            _rewrite(match)
        return ir.passes.PassResult(model, bool(matches))


@dataclass(frozen=True)
class _Match:
    argmax: ir.Node
    gemm: ir.Node
    channels: int
    actions: int


def _match(node: ir.Node) -> _Match | None:
    if not is_op(node, "ArgMax"):
        return None
    scores = node.inputs[0]
    reshape = made_by(scores, "Reshape")
    if reshape is None or scores is None or scores.shape is None:
        return None
    gemm = made_by(reshape.inputs[0], "Gemm")
    if gemm is None or not _is_linear(gemm) or not _takes_first_over_last(node, scores):
        return None
    _, channels, actions = scores.shape
    flat = array_of(gemm.inputs[1])
    if flat is None or not isinstance(channels, int) or not isinstance(actions, int):
        return None
    return _Match(node, gemm, channels, actions) if actions in (2, 3) and len(flat) == channels * actions else None


def _takes_first_over_last(node: ir.Node, scores: ir.Value) -> bool:
    given = attributes_of(node)
    last = given.get("axis", 0) in (-1, 2) and scores.shape is not None and len(scores.shape) == 3
    return last and given.get("keepdims", 1) == 0 and given.get("select_last_index", 0) == 0


def _is_linear(gemm: ir.Node) -> bool:
    given = attributes_of(gemm)
    plain = given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    constant = bias is None or array_of(bias) is not None
    return plain and constant and given.get("transB", 0) == 1 and given.get("transA", 0) == 0


def _rewrite(match: _Match) -> None:
    node, gemm, channels = match.argmax, match.gemm, match.channels
    build = Builder(metadata=node.metadata_props)
    constants = [_differences(value, match) for value in gemm.inputs[1:] if value is not None]
    assert gemm.outputs[0].shape is not None
    frames = gemm.outputs[0].shape[0]

    def op(op_type: str, *inputs: ir.Value, dtype: ir.DataType, columns: int = channels, **attributes: Any) -> ir.Value:
        return build.op(op_type, *inputs, shape=[frames, columns], dtype=dtype, **attributes)

    boolean, whole, real = ir.DataType.BOOL, ir.DataType.INT64, ir.DataType.FLOAT
    rows = (match.actions - 1) * channels
    scores = build.op("Gemm", gemm.inputs[0], *constants, shape=[frames, rows], dtype=real, transB=1)
    zero = build.const(np.float32(0))
    if match.actions == 2:
        action = op("Cast", op("Greater", scores, zero, dtype=boolean), dtype=whole, to=int(whole))
    else:
        first = op("Slice", scores, build.ints(0), build.ints(channels), build.ints(1), dtype=real)
        second = op("Slice", scores, build.ints(channels), build.ints(2 * channels), build.ints(1), dtype=real)
        is_second = op("Greater", second, op("Relu", first, dtype=real), dtype=boolean)
        is_first = op("Cast", op("Greater", first, zero, dtype=boolean), dtype=whole, to=int(whole))
        action = op("Where", is_second, build.const(np.int64(2)), is_first, dtype=whole)
    replace_node(node, build, [action])


def _differences(value: ir.Value, match: _Match) -> ir.Value:
    """Return rows `[(K - 1) * C, ...]`, action by action, of a constant `[C * K, ...]`, whose actions are next to each
    other. Policies that share a layer share these too.
    """
    graph, array = match.argmax.graph, array_of(value)
    assert isinstance(graph, ir.Graph) and array is not None
    name = f"{value.name}.differences"
    if name not in graph.initializers:
        rows = array.reshape(match.channels, match.actions, -1)
        less = np.moveaxis(rows[:, 1:] - rows[:, :1], 1, 0).reshape(-1, *array.shape[1:])
        tensor = ir.tensor(np.ascontiguousarray(less), name=name)
        made = ir.Value(name=name, const_value=tensor, shape=ir.Shape(less.shape), type=ir.TensorType(tensor.dtype))
        graph.register_initializer(made)
    return graph.initializers[name]
