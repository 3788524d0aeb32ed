"""The backends by name: each is a folder here, found by its `backend.py`."""

from __future__ import annotations

from dvexport.errors import UsageError, unknown_name
from dvexport.targets.backend import Backend
from dvexport.targets.discover import BACKENDS, PLANNED, part_of

__all__ = ["backend_of"]


def backend_of(name: str) -> Backend:
    """Return a backend; UsageError if there is none of that name."""
    if name in PLANNED:
        raise UsageError(f"backend '{name}' is not in this release", hint=f"one of: {', '.join(BACKENDS)}")
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    return part_of(name, "backend").BACKEND
