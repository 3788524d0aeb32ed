"""What follows from the operators that make a value."""

from __future__ import annotations

import onnx_ir as ir

from dvexport.dialect.spec import operator_of
from dvexport.graph.graph import array_of
from dvexport.graph.match import is_op

__all__ = ["averages_planes", "is_nonnegative"]


def averages_planes(node: ir.Node) -> bool:
    """Tell whether a node is a `ReduceMean` over height and width, the last axes of `[N, C, H, W]`."""
    axes = array_of(node.inputs[1]) if is_op(node, "ReduceMean") and len(node.inputs) > 1 else None
    return axes is not None and sorted(int(axis) % 4 for axis in axes) == [2, 3]


def is_nonnegative(value: ir.Value, depth: int = 64) -> bool:
    """Tell whether a value is known never to be negative."""
    node = value.producer()
    if node is None or depth == 0:
        return False
    if is_op(node, "Relu", "Sigmoid", "Abs"):
        return True
    if is_op(node, "MaxPool", "AveragePool", "Identity"):
        return is_nonnegative(node.inputs[0], depth - 1)  # type: ignore[arg-type]
    operator = operator_of(node)
    if operator is None or operator.name != "SparseConv":
        return False
    base = operator.bind(node)["base"]
    relu = operator.attributes_of(node)["activation"] == "relu"
    return relu and (base is None or is_nonnegative(base, depth - 1))
