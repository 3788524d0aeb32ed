"""The backends by name: each is a folder here, found by its `backend.py`."""

from __future__ import annotations

from collections.abc import Mapping

from dvexport.errors import DvexportError, UsageError, unknown_name
from dvexport.targets.backend import Backend
from dvexport.targets.catalogue import Target
from dvexport.targets.discover import BACKENDS, PLANNED, part_of

__all__ = ["backend_of", "best_backend"]


def backend_of(name: str) -> Backend:
    """Return a backend; UsageError if there is none of that name."""
    if name in PLANNED:
        raise UsageError(f"backend '{name}' is not in this release", hint=f"one of: {', '.join(BACKENDS)}")
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    return part_of(name, "backend").BACKEND


def best_backend(device: Target, lowering: Mapping[str, str] | None = None) -> tuple[str, dict[str, DvexportError]]:
    """Return the backend that saves most of those that are installed and fit a device, and why none better is it.

    Args:
        lowering: lowerings asked for, by gate.

    Raises:
        UsageError, DeviceError: none fits; the error is that of the best.
    """
    refused: dict[str, DvexportError] = {}
    for name in sorted(BACKENDS, key=lambda name: backend_of(name).rank):
        try:
            backend_of(name).check(device, lowering or {})
        except DvexportError as error:
            refused[name] = error
        else:
            return name, refused
    raise next(iter(refused.values()))
