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
from dvexport.passes.frame_axis import frame_dims, frames_stay_apart

__all__ = ["SetClip", "SetStream"]

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
    """Refuse a node by which one frame's numbers get into another's, or that drops or counts the frame axis."""
    if operator_of(node) is not None or is_op(node, "Shape", "Size"):
        return
    reads_frames = any(v is not None and frame_dims(v) for v in node.inputs)
    makes_frames = any(frame_dims(v) for v in node.outputs)
    if not reads_frames and (not makes_frames or is_op(node, *_ALIKE)):
        return
    for value in node.outputs:
        dims = frame_dims(value)
        whole = len(dims) == 1 and dims[0][1] == FRAMES
        if whole and reads_frames and frames_stay_apart(node, dims[0][0]):
            continue
        starts = array_of(node.inputs[1]) if is_op(node, "Slice") else None
        ahead = starts is not None and np.any(starts > 0)
        verb = "reads the frame ahead" if ahead else "mixes frames"
        raise TraceError(
            f"the model can't run in stream mode: a node {verb}",
            where=source_of(node),
            why="it works along the frame axis, or counts it"
            if whole
            else f"its output has shape {value.shape}, where the frame axis must stay '{FRAMES}'",
            hint="export with --mode clip, or use the online variant of the model"
            if ahead
            else "export with --mode clip, or use dvexport.gates.delay and frame_mean",
        )


def _substitute(model: ir.Model, frames: int) -> None:
    """Put the number in every shape, expressions such as `frames - 1` included."""
    values = list(model.graph.inputs)
    for node in model.graph.all_nodes():
        values += node.outputs
    for value in values:
        if value.shape is not None:
            dims = [dim if isinstance(dim, int) else dim.evaluate({FRAMES: frames}) for dim in value.shape]
            value.shape = ir.Shape(dims)
