"""Units of transformers that are one operator: norms, the choice of tokens, single elements written, large views."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from dvexport.graph.graph import array_of, static_shape
from dvexport.targets.tvm.machine.dtype import F32
from dvexport.targets.tvm.units.kinds import Family, Role
from dvexport.targets.tvm.units.unit import Unit
from dvexport.targets.tvm.units.views import LARGE, View, is_dense, is_float, view_of

__all__ = ["FAMILY", "ViewUnit"]

FAMILY = Family()

_LINE = F32.line
"""Floats that parts of a buffer are aligned to."""


@dataclass(kw_only=True)
class ViewUnit(Unit):
    """A value that is some neighbouring elements of another."""

    view: View


@FAMILY.kind("layer_norm", ops=("LayerNormalization",), role=Role.OTHER, flat=True)
def _layer_norm(node: ir.Node, images: Collection[ir.Value]) -> Unit | None:
    x = node.inputs[0]
    if x is None or not is_float(x) or len(node.outputs) > 1:
        return None
    constants = len(node.inputs) == 3 and all(array_of(value) is not None for value in node.inputs[1:])
    return Unit("layer_norm", [node]) if _is_last(node.attributes.get_int("axis", -1), x) and constants else None


@FAMILY.kind("select_tokens", ops=("dv.SelectTokens",), role=Role.DECIDE, flat=True)
def _select_tokens(node: ir.Node, images: Collection[ir.Value]) -> Unit:
    return Unit("select_tokens", [node])


@FAMILY.kind("scatter", ops=("ScatterElements",), role=Role.MOVE, flat=True)
def _scatter(node: ir.Node, images: Collection[ir.Value]) -> Unit | None:
    """Match single elements written along the last axis, every row at places of its own."""
    x, index, updates = node.inputs
    if node.attributes.get_string("reduction", "none") != "none" or x is None or index is None or updates is None:
        return None
    alike = static_shape(x)[:-1] == static_shape(index)[:-1] and _is_last(node.attributes.get_int("axis", 0), x)
    known = x.dtype in (ir.DataType.FLOAT, ir.DataType.INT64) and index.dtype == ir.DataType.INT64
    return Unit("scatter", [node]) if alike and known else None


def _is_last(axis: int, value: ir.Value) -> bool:
    rank = len(static_shape(value))
    return axis % rank == rank - 1


@FAMILY.kind("view", ops=("Reshape", "Squeeze", "Unsqueeze", "Slice", "Split"), role=Role.MOVE, flat=True)
def _view(node: ir.Node, images: Collection[ir.Value]) -> ViewUnit | None:
    """Match views each of which lies in one piece: the results of one operator, all in one value."""
    if any(value.is_graph_output() or not is_float(value) for value in node.outputs):
        return None
    views = [view_of(value) for value in node.outputs]
    base = views[0].base
    dense = all(is_dense(view) and view.nodes and view.offset % _LINE == 0 for view in views)
    large = prod(static_shape(base)) >= LARGE and base.dtype == ir.DataType.FLOAT
    own = all(view.base is base and view.nodes[-1:] == (node,) for view in views)
    if not dense or not large or not own or array_of(base) is not None:
        return None
    return ViewUnit(kind="view", nodes=[node], reads=[base], view=views[0])
