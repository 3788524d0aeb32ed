"""Which backends there are: the folders here that have a `backend.py`. Nothing is imported to know their names."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

__all__ = ["BACKENDS", "PLANNED", "part_of"]

BACKENDS = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/backend.py")))
"""Names of the backends."""

PLANNED = ("tflite",)
"""Backends that a later release brings: catalogue entries may have a table for one."""


def part_of(backend: str, part: str) -> ModuleType:
    """Return a module that every backend has: `backend` or `table`."""
    return importlib.import_module(f"{__package__}.{backend}.{part}")
