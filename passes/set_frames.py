"""Fix the frame axis: T frames at once (clip), or one frame a step with explicit state (stream).

A traced model has a symbolic frame axis and crosses frames only through `Delay`, `FrameMean` and
the history of `GatedConv`. With one frame a step each of these becomes a state, and T steps
from zero states compute what the clip computes. A model that mixes frames in any other way
reads frames a stream has not seen yet, or no longer has; it is refused.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dvexport.dialect.spec import operator_of
from dvexport.errors import TraceError, UsageError
from dvexport.graph.graph import FRAMES, array_of, source_of, whole_clip_of
from dvexport.graph.match import is_op

__all__ = ["SetClip", "SetStream"]

_ALONG_AXIS = {
    "Gather": 0, "GatherElements": 0, "ScatterElements": 0, "Softmax": -1, "LogSoftmax": -1, "Hardmax": -1,
    "TopK": -1, "LayerNormalization": -1, "LpNormalization": -1,
}  # fmt: skip
"""Operators that keep a shape and yet compute along an axis, with the axis they take by default."""

_ALIKE = ("Expand", "ConstantOfShape")
"""Operators that make a frame axis on which all frames are alike."""


class SetClip(ir.passes.InPlacePass):
    """Fix the frame axis to `frames`; UsageError where the model reads clips of another length as one."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Substitute the symbol in every shape."""
        fixed = whole_clip_of(model)
        if fixed is not None:
            if fixed != self.frames:
                raise UsageError(f"the model reads a clip of {fixed} frames as one, not of {self.frames}")
            return ir.passes.PassResult(model, modified=False)
        _substitute(model, self.frames)
        return ir.passes.PassResult(model, modified=True)


class SetStream(ir.passes.InPlacePass):
    """Fix the frame axis to one frame a step, every memory a named state.

    Raises:
        TraceError: a node reads ahead or mixes frames; its place in the model is named.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Refuse non-causal models, then turn memories into states."""
        fixed = whole_clip_of(model)
        if fixed is not None:
            raise TraceError(
                "the model can't run in stream mode: it reads a clip as one",
                why=f"its tokens are of all {fixed} frames, and its result is of the whole clip",
                hint="export with --mode clip",
            )
        for node in model.graph:
            _refuse_mixing(node)
        _substitute(model, 1)
        for node in list(model.graph):
            operator = operator_of(node)
            if operator is not None:
                operator.stream(model, node)
        return ir.passes.PassResult(model, modified=True)


def _refuse_mixing(node: ir.Node) -> None:
    """Refuse a node that changes or drops the frame axis."""
    if operator_of(node) is not None or is_op(node, "Shape", "Size"):
        return
    reads_frames = any(v is not None and _frame_dims(v) for v in node.inputs)
    makes_frames = any(_frame_dims(v) for v in node.outputs)
    if not reads_frames and (not makes_frames or is_op(node, *_ALIKE)):
        return
    mixes = not reads_frames or _works_along_frames(node)
    for value in node.outputs:
        dims = _frame_dims(value)
        if dims == [(0, FRAMES)] and not mixes:
            continue
        starts = array_of(node.inputs[1]) if is_op(node, "Slice") else None
        ahead = starts is not None and np.any(starts > 0)
        verb = "reads the frame ahead" if ahead else "mixes frames"
        raise TraceError(
            f"the model can't run in stream mode: a node {verb}",
            where=source_of(node),
            why="it works along the frame axis, or counts it"
            if mixes
            else f"its output has shape {value.shape}, where the frame axis must stay '{FRAMES}'",
            hint="export with --mode clip, or use the online variant of the model"
            if ahead
            else "export with --mode clip, or use dvexport.gates.delay and frame_mean",
        )


def _works_along_frames(node: ir.Node) -> bool:
    """Tell whether a node that keeps the shape of its first input computes across its axis 0."""
    value = node.inputs[0]
    if value is None or (0, FRAMES) not in _frame_dims(value):
        return False
    axes: list[int] = []
    if is_op(node, "CumSum"):
        axes = [int(np.ravel(_known(node, 1))[0])]
    elif is_op(node, "Slice") and len(node.inputs) > 4:  # a flip is a slice of step -1
        stepped = zip(np.ravel(_known(node, 3)), np.ravel(_known(node, 4)), strict=True)
        axes = [int(axis) for axis, step in stepped if step != 1]
    elif is_op(node, *_ALONG_AXIS):
        axes = [node.attributes.get_int("axis", _ALONG_AXIS[node.op_type])]
    assert value.shape is not None
    return any(axis % len(value.shape) == 0 for axis in axes)


def _known(node: ir.Node, position: int) -> np.ndarray:
    """Return a constant input; an unknown one might be the frame axis, which is 0."""
    array = array_of(node.inputs[position])
    return np.zeros(1, np.int64) if array is None else array


def _frame_dims(value: ir.Value) -> list[tuple[int, str]]:
    """Return the (axis, text) of the dimensions that speak of the frame symbol."""
    if value.shape is None:
        return []
    texts = [(axis, str(dim)) for axis, dim in enumerate(value.shape) if not isinstance(dim, int)]
    return [(axis, text) for axis, text in texts if FRAMES in text]


def _substitute(model: ir.Model, frames: int) -> None:
    """Put the number in every shape, expressions such as `frames - 1` included."""
    values = list(model.graph.inputs)
    for node in model.graph.all_nodes():
        values += node.outputs
    for value in values:
        if value.shape is not None:
            dims = [dim if isinstance(dim, int) else dim.evaluate({FRAMES: frames}) for dim in value.shape]
            value.shape = ir.Shape(dims)
