"""Whether a node keeps frames apart: each frame of its output is made of the same frame of its inputs, and no other.

Frames are one axis, the first in a model. A layer may move it, compute beside it and move it back, as index arithmetic
on pixels does. Where a node has it elsewhere than in front, the rule of its operator says where it goes; an operator
without a rule has to have it in front.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import numpy as np
import onnx_ir as ir

from dvexport.graph.graph import FRAMES, array_of
from dvexport.graph.match import is_op

__all__ = ["frame_dims", "frames_stay_apart"]

_ALONG_AXIS = {
    "Gather": 0, "GatherElements": 0, "ScatterElements": 0, "Softmax": -1, "LogSoftmax": -1, "Hardmax": -1,
    "TopK": -1, "LayerNormalization": -1, "LpNormalization": -1,
}  # fmt: skip
"""Operators that keep a shape and yet compute along an axis, with the axis they take by default."""


def frame_dims(value: ir.Value) -> list[tuple[int, str]]:
    """Return the (axis, text) of the dimensions that speak of the frame symbol."""
    if value.shape is None:
        return []
    texts = [(axis, str(dim)) for axis, dim in enumerate(value.shape) if not isinstance(dim, int)]
    return [(axis, text) for axis, text in texts if FRAMES in text]


def frames_stay_apart(node: ir.Node, axis: int) -> bool:
    """Return whether a node keeps frames apart, whose output has them on `axis`."""
    places = {index: frame_dims(v) for index, v in enumerate(node.inputs) if v is not None and frame_dims(v)}
    if any(len(dims) != 1 or dims[0][1] != FRAMES for dims in places.values()):
        return False
    frames = {index: dims[0][0] for index, dims in places.items()}
    if axis == 0 and not any(frames.values()):
        return not _works_along(node, 0)
    rule = _RULES.get(node.op_type)
    return rule is not None and rule(node, frames, axis)


_Rule = Callable[[ir.Node, Mapping[int, int], int], bool]
"""Whether the rule of an operator holds: the node, the frame axis of each input that has one, that of the output."""


def _elementwise(node: ir.Node, frames: Mapping[int, int], axis: int) -> bool:
    rank = _rank(node.outputs[0])
    return all(rank - _rank(node.inputs[index]) + at == axis for index, at in frames.items())


def _transpose(node: ir.Node, frames: Mapping[int, int], axis: int) -> bool:
    return list(node.attributes.get_ints("perm", list(reversed(range(_rank(node.inputs[0]))))))[axis] == frames[0]


def _gather(node: ir.Node, frames: Mapping[int, int], axis: int) -> bool:
    if set(frames) != {0}:
        return False
    along = node.attributes.get_int("axis", 0) % _rank(node.inputs[0])
    wanted = frames[0] if frames[0] < along else frames[0] + _rank(node.inputs[1]) - 1
    return along != frames[0] and wanted == axis


def _gather_nd(node: ir.Node, frames: Mapping[int, int], axis: int) -> bool:
    """Indices of the first axes take whole slices of the others."""
    indices, batched = node.inputs[1], node.attributes.get_int("batch_dims", 0)
    if set(frames) != {0} or batched or indices is None or indices.shape is None:
        return False
    taken = indices.shape[-1]
    return isinstance(taken, int) and frames[0] >= taken and axis == _rank(indices) - 1 + frames[0] - taken


def _reduce(node: ir.Node, frames: Mapping[int, int], axis: int) -> bool:
    axes = array_of(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if axes is None or set(frames) != {0}:
        return False
    reduced = {int(each) % _rank(node.inputs[0]) for each in axes.ravel()}
    kept = node.attributes.get_int("keepdims", 1) != 0
    return frames[0] not in reduced and axis == frames[0] - (0 if kept else sum(each < frames[0] for each in reduced))


def _reshape(node: ir.Node, frames: Mapping[int, int], axis: int) -> bool:
    """The same numbers stand before and behind the frames, so each frame keeps its own."""
    if set(frames) != {0}:
        return False
    before = [_product(value, at) for value, at in ((node.inputs[0], frames[0]), (node.outputs[0], axis))]
    return before[0] is not None and before[0] == before[1]


def _beside(node: ir.Node, frames: Mapping[int, int], axis: int) -> bool:
    """It computes along an axis that it names."""
    return all(at == axis for at in frames.values()) and not _works_along(node, axis)


def _concat(node: ir.Node, frames: Mapping[int, int], axis: int) -> bool:
    along = node.attributes.get_int("axis", 0) % _rank(node.outputs[0])
    return len(frames) == len(node.inputs) and along != axis and all(at == axis for at in frames.values())


def _split(node: ir.Node, frames: Mapping[int, int], axis: int) -> bool:
    return node.attributes.get_int("axis", 0) % _rank(node.inputs[0]) != axis == frames.get(0)


_ELEMENTWISE = (
    "Abs", "Add", "And", "Cast", "Ceil", "Clip", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater",
    "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min",
    "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Softplus", "Sqrt", "Sub",
    "Sum", "Tanh", "Where", "Xor",
)  # fmt: skip
"""Operators that compute number by number, their inputs broadcast."""

_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    "Transpose": _transpose,
    "Gather": _gather,
    "GatherND": _gather_nd,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(
        ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare",
         "ReduceLogSum", "ReduceLogSumExp"), _reduce,
    ),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "CumSum", "Slice"), _beside),
    "Concat": _concat,
    "Split": _split,
}  # fmt: skip


def _works_along(node: ir.Node, frames: int) -> bool:
    """Tell whether a node that keeps the shape of its first input computes across its frame axis."""
    value = node.inputs[0]
    if value is None or (frames, FRAMES) not in frame_dims(value):
        return False
    axes: list[int] = []
    if is_op(node, "CumSum"):
        axes = [int(np.ravel(_known(node, 1, frames))[0])]
    elif is_op(node, "Slice") and len(node.inputs) > 4:  # a flip is a slice of step -1
        stepped = zip(np.ravel(_known(node, 3, frames)), np.ravel(_known(node, 4, frames)), strict=True)
        axes = [int(axis) for axis, step in stepped if step != 1]
    elif is_op(node, *_ALONG_AXIS):
        axes = [node.attributes.get_int("axis", _ALONG_AXIS[node.op_type])]
    assert value.shape is not None
    return any(axis % len(value.shape) == frames for axis in axes)


def _known(node: ir.Node, position: int, frames: int) -> np.ndarray:
    """Return a constant input; an unknown one might be the frame axis."""
    array = array_of(node.inputs[position])
    return np.full(1, frames, np.int64) if array is None else array


def _rank(value: ir.Value | None) -> int:
    assert value is not None and value.shape is not None
    return len(value.shape)


def _product(value: ir.Value | None, axes: int) -> int | None:
    """Return how many numbers the first axes have; None if that is not known."""
    assert value is not None and value.shape is not None
    sizes = list(value.shape)[:axes]
    return prod(size for size in sizes if isinstance(size, int)) if all(isinstance(s, int) for s in sizes) else None
