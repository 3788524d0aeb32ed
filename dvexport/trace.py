"""From a torch model to gate-level ONNX: a dynamic frame axis, or a fixed one where the model reads a clip as one."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from dvexport.dialect import operator_of
from dvexport.dialect.spec import decisions_at
from dvexport.errors import DvexportError, TraceError
from dvexport.graph.fold import fold_constants
from dvexport.graph.graph import DV, FRAMES, OPSET, make_contiguous, mark_whole_clip, source_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["trace"]

_EXAMPLE_FRAMES = 3  # any number that torch does not specialise on, as it does on 0 and 1


def trace(model: nn.Module, size: tuple[int, int]) -> ir.Model:
    """Trace `model` into gate-level ONNX.

    Args:
        model: takes `[frames, 3, height, width]`, returns `[frames, classes]`, or `[1, classes]` if it has
            `whole_clip` (`models.base.VideoModel`); put in eval mode.
        size: height and width of a frame, in pixels.

    Returns:
        A model with input `frames`, output `logits`, the frame axis symbolic (fixed for a model that reads whole
        clips, see `graph.whole_clip_of`), batch norm folded, and each gate a node of the `dv` domain with
        its shapes set.

    Raises:
        TraceError: torch can't trace the model, or a gate is illegal.
        UsageError: a gate is called with something that the dialect has no place for (`dvexport.gates`).
    """
    import torch

    model = model.eval()
    frames: int | None = model.preprocess.frames if getattr(model, "whole_clip", False) else None  # type: ignore[union-attr,assignment]
    example = torch.zeros(frames or _EXAMPLE_FRAMES, 3, *size)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[FRAMES],
                output_names=["logits"],
                dynamic_shapes=None if frames else ({0: torch.export.Dim(FRAMES)},),
                verbose=False,
            )
    except Exception as error:
        refusal = _refusal(error)
        if refusal is not None:
            raise refusal from None
        cause = error.__cause__ or error
        raise TraceError(
            "the model can't be traced",
            where=type(model).__name__,
            why=str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__,
            hint="gates must use dvexport.gates, and no Python branch may depend on a tensor's values",
        ) from error
    assert program is not None
    _refuse_dropped(program.exported_program)
    traced = program.model
    fold_constants(traced)
    make_contiguous(traced)  # here, and not in each variant that is made of it: transposed weights are as large as all
    if frames:
        mark_whole_clip(traced, frames)
    _check(traced)
    return traced


def _refusal(error: BaseException | None) -> DvexportError | None:
    """Return the error of ours that the exporter has wrapped in its own."""
    while error is not None and not isinstance(error, DvexportError):
        error = error.__cause__ or error.__context__
    return error


def _refuse_dropped(program: Any) -> None:
    """Refuse the one argument that torch's exporter is known to drop: ONNX's AveragePool has no place for it."""
    for node in program.graph.nodes:
        name = "divisor_override"
        if "avg_pool" not in str(node.target) or node.op != "call_function":
            continue
        places = [argument.name for argument in node.target._schema.arguments]
        given = dict(zip(places, node.args, strict=False)) | dict(node.kwargs)
        if given.get(name) is not None:
            raise TraceError(
                f"an average pool has {name}={given[name]}",
                where=str(node.name),
                why="ONNX divides by the size of the window, and the exporter would drop it",
                hint="leave it out, and multiply what the pool gives",
            )


def _check(model: ir.Model) -> None:
    """Check every gate right after tracing, while its place in the model is known."""
    for node in model.graph:
        operator = operator_of(node)
        if node.domain == DV and operator is None:
            raise TraceError(f"dv.{node.op_type} is not an operator of the dialect", where=source_of(node))
        if operator is None:
            continue
        found = operator.problems(node)
        if found:
            raise TraceError(f"{source_of(node)} {found[0]}")
        operator.infer(node)
    _check_decisions(model)
    model.graph.opset_imports.setdefault(DV, 1)


def _check_decisions(model: ir.Model) -> None:
    """Refuse a gate whose convolutions follow different decisions: one is shown, forced and counted for all."""
    seen: dict[tuple[str, str], ir.Value] = {}
    for node in model.graph:
        for key, value in decisions_at(node).items():
            if seen.setdefault(key, value) is not value:  # equal expressions are one value by now
                gate, kind = key
                raise TraceError(
                    f"gate '{gate}' has two decisions over {kind}",
                    where=source_of(node),
                    why="a gate is one decision of a kind; what a bundle shows and counts is the first one's",
                    hint="give each its own name, such as layer1.0.second",
                )


@contextlib.contextmanager
def _quiet():
    """Silence the exporter's progress and its notes on type promotion."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
