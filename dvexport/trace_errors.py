"""Why torch can't trace a model, in one line and with its place in the model's code: torch's own words run to pages."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

from dvexport.errors import DvexportError, TraceError

__all__ = ["trace_error"]

_NO_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'")
_BRANCH = "GuardOnDataDependentSymNode"
"""torch's name for a Python branch, or a size, that depends on the values of a tensor."""
_OURS, _PYTHON = str(Path(__file__).parent), str(Path(traceback.__file__).parent)


def trace_error(error: BaseException, model: str) -> DvexportError:
    """Return what an error of torch's exporter means; an error of ours inside it is handed on as it is.

    Args:
        error: what the exporter raised.
        model: name of the model's class.
    """
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, DvexportError):
            return cause
    told = "\n".join(str(cause) for cause in causes)
    place = next((found for cause in reversed(causes) if (found := _place(cause))), "")
    where = f"{model}, {place}" if place else model
    missing = _NO_OPERATOR.search(told)
    if missing:
        name = missing.group(1).rpartition(".")[2].strip("_")
        return TraceError(
            f"ONNX has no operator for torch's '{name}'",
            where=where,
            hint="compute it from other operators, or outside of the model",
        )
    if any(type(cause).__name__ == _BRANCH for cause in causes):
        return TraceError(
            "a Python branch or a size depends on a tensor's values",
            where=where,
            why="a trace follows one way for all inputs",
            hint="decide by dvexport.gates, or by torch.where",
        )
    first = next((line for line in str(error.__cause__ or error).splitlines() if line.strip()), type(error).__name__)
    hint = "gates must use dvexport.gates, and no Python branch may depend on a tensor's values"
    return TraceError("the model can't be traced", where=where, why=first.strip(), hint=hint)


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and all that it wraps, the outermost first."""
    causes: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in causes:
        causes.append(step)
        step = step.__cause__ or step.__context__
    return causes


def _place(error: BaseException) -> str:
    """Return the innermost line of the model's own code that an error passed through, empty if it passed none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        foreign = "site-packages" in path.parts or frame.filename.startswith((_OURS, _PYTHON))
        if path.is_file() and not foreign:
            return f"{path.name} line {frame.lineno}"
    return ""
