"""Units of single operators over images: pooling, means, merges, sums, joins and parts."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from dvexport.dialect.facts import averages_planes, is_nonnegative
from dvexport.graph.graph import array_of
from dvexport.targets.tvm.kernels.plane import MOST_STEP
from dvexport.targets.tvm.units.kinds import Family, Image, Purpose, Role
from dvexport.targets.tvm.units.unit import Unit

__all__ = ["FAMILY"]

FAMILY = Family()


@FAMILY.kind("max_pool", ops=("MaxPool",), role=Role.OTHER, planar=True, image=Image.KEEPS)
def _max_pool(node: ir.Node, images: Collection[ir.Value]) -> Unit | None:
    x, given = node.inputs[0], node.attributes
    assert x is not None
    plain = given.get_int("ceil_mode", 0) == 0 and list(given.get_ints("dilations", [1, 1])) == [1, 1]
    steps = given.get_ints("strides", [1])[-1] <= MOST_STEP
    if x not in images or not plain or len(node.outputs) != 1 or not steps:
        return None
    # The padding of our planes is zero; that of a maximum is minus infinity.
    if any(given.get_ints("pads", [0] * 4)) and not is_nonnegative(x):
        return None
    return Unit("max_pool", [node])


@FAMILY.kind("avg_pool", ops=("AveragePool",), role=Role.DECIDE, image=Image.KEEPS)
def _avg_pool(node: ir.Node, images: Collection[ir.Value]) -> Unit | None:
    given = node.attributes
    plain = given.get_int("ceil_mode", 0) == 0 and not any(given.get_ints("pads", [0] * 4))
    tiled = list(given.get_ints("kernel_shape", [])) == list(given.get_ints("strides", [1, 1]))
    return Unit("avg_pool", [node]) if node.inputs[0] in images and plain and tiled else None


@FAMILY.kind("mean", ops=("ReduceMean",), role=Role.DECIDE)
def _mean(node: ir.Node, images: Collection[ir.Value]) -> Unit | None:
    return Unit("mean", [node]) if node.inputs[0] in images and averages_planes(node) else None


@FAMILY.kind(
    "merge", ops=("dv.Merge",), role=Role.MOVE, planar=True, image=Image.MAKES, purpose=Purpose.MERGES
)  # fmt: skip
def _merge(node: ir.Node, images: Collection[ir.Value]) -> Unit:
    return Unit("merge", [node])


@FAMILY.kind("relu", ops=("Relu",), role=Role.MOVE, planar=True, image=Image.KEEPS, purpose=Purpose.COPIES)
def _relu(node: ir.Node, images: Collection[ir.Value]) -> Unit | None:
    return Unit("relu", [node]) if _are_alike(node, images) else None


@FAMILY.kind("add", ops=("Add",), role=Role.MOVE, planar=True, image=Image.KEEPS)
def _add(node: ir.Node, images: Collection[ir.Value]) -> Unit | None:
    return Unit("add", [node]) if _are_alike(node, images) else None


def _are_alike(node: ir.Node, images: Collection[ir.Value]) -> bool:
    """Tell whether all that a node reads is images of its result's size."""
    return all(v in images and v.shape == node.outputs[0].shape for v in node.inputs if v is not None)


@FAMILY.kind("concat", ops=("Concat",), role=Role.MOVE, planar=True, image=Image.KEEPS)
def _concat(node: ir.Node, images: Collection[ir.Value]) -> Unit | None:
    joins = node.outputs[0] in images and node.attributes.get_int("axis", 0) in (0, 1)
    return Unit("concat", [node]) if joins else None


@FAMILY.kind("slice", ops=("Slice",), role=Role.MOVE, planar=True, image=Image.KEEPS)
def _slice(node: ir.Node, images: Collection[ir.Value]) -> Unit | None:
    """Match a part of the frames or of the channels."""
    if node.outputs[0] not in images or len(node.inputs) < 4:
        return None
    axes = array_of(node.inputs[3])
    steps = array_of(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1, np.int64)
    fixed = all(array_of(v) is not None for v in node.inputs[1:3])
    if axes is None or steps is None or not fixed or len(axes) != 1:
        return None
    return Unit("slice", [node]) if int(axes[0]) in (0, 1) and int(steps[0]) == 1 else None


@FAMILY.kind("copy", ops=("Identity",), role=Role.MOVE, image=Image.KEEPS, purpose=Purpose.COPIES)
def _copy(node: ir.Node, images: Collection[ir.Value]) -> Unit | None:
    return Unit("copy", [node]) if array_of(node.inputs[0]) is None else None
