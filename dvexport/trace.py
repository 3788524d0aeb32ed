"""From a torch model to gate-level ONNX: a dynamic frame axis, or a fixed one where the model reads a clip as one."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from dvexport.dialect import operator_of
from dvexport.dialect.spec import decisions_at
from dvexport.errors import TraceError
from dvexport.graph.fold import fold_constants
from dvexport.graph.graph import DV, FRAMES, OPSET, make_contiguous, mark_whole_clip, source_of
from dvexport.ports import VIDEO, outputs_of
from dvexport.trace_errors import trace_error

__all__ = ["trace"]

_EXAMPLE_FRAMES = 3  # any number that torch does not specialise on, as it does on 0 and 1


def trace(model: Any, inputs: tuple[int, int] | Mapping[str, tuple[int, ...]]) -> ir.Model:
    """Trace `model` into gate-level ONNX.

    Args:
        model: takes and returns tensors whose first axis is frames; one row of results if it has `whole_clip`
            (`models.base.VideoModel`). Its outputs are `ports.outputs_of` it. Put in eval mode.
        inputs: shape of one frame of every input, in the order of forward; or height and width of a frame for a model
            that takes `frames` `[frames, 3, height, width]` alone.

    Returns:
        A model with inputs and outputs of these names, the frame axis symbolic (fixed for a model that reads whole
        clips, see `graph.whole_clip_of`), batch norm folded, and each gate a node of the `dv` domain with
        its shapes set.

    Raises:
        TraceError: torch can't trace the model, or a gate is illegal.
        UsageError: a gate is called with something that the dialect has no place for (`dvexport.gates`).
    """
    import torch

    model = model.eval()
    frames: int | None = model.preprocess.frames if getattr(model, "whole_clip", False) else None  # type: ignore[union-attr,assignment]
    shapes = dict(inputs) if isinstance(inputs, Mapping) else {VIDEO: (3, *inputs)}
    outputs = [output.name for output in outputs_of(model)]
    example = tuple(torch.zeros(frames or _EXAMPLE_FRAMES, *shape) for shape in shapes.values())
    module = getattr(model, "unwrapped", model)  # the module of a `models.described.Described`
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                example,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(shapes),
                output_names=outputs,
                dynamic_shapes=None if frames else tuple({0: torch.export.Dim(FRAMES)} for _ in shapes),
                verbose=False,
            )
    except Exception as error:
        raise trace_error(error, type(module).__name__) from None
    assert program is not None
    _refuse_dropped(program.exported_program)
    traced = program.model
    fold_constants(traced)
    make_contiguous(traced)  # here, and not in each variant that is made of it: transposed weights are as large as all
    if frames:
        mark_whole_clip(traced, frames)
    _check_ports(traced, list(shapes), outputs, type(module).__name__, frames is None)
    _check(traced)
    return traced


def _check_ports(model: ir.Model, inputs: list[str], outputs: list[str], where: str, dynamic: bool) -> None:
    """Check that the graph takes and gives what the model said, each with the frame axis."""
    given = [value.name for value in model.graph.outputs]
    if given != outputs:
        raise TraceError(
            f"the model gives {len(given)} outputs, and says it gives {', '.join(outputs)}",
            where=where,
            hint="name them all in declared_outputs, see docs/adding-a-model.md",
        )
    taken = [value.name for value in model.graph.inputs]
    if missing := [name for name in inputs if name not in taken]:
        raise TraceError(f"the input '{missing[0]}' was lost in the trace", where=where)
    for value in model.graph.outputs if dynamic else ():
        if value.shape is None or not value.shape or str(value.shape[0]) != FRAMES:
            raise TraceError(
                "an output lacks the frame axis",
                where=f"{where}, '{value.name}'",
                why=f"its shape is {value.shape}, where the first size must be '{FRAMES}'",
                hint="give one row for each frame, frames first",
            )


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
    """Silence the exporter's progress, its notes on type promotion and the graphs that it prints where it fails."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "torch.fx", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        said = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
