"""Names of the files that a native artifact consists of, in a bundle."""

from __future__ import annotations

from dvexport.bundle.trust import CODE
from dvexport.graph.weights import WEIGHTS

__all__ = ["HEADER", "LIBRARY", "NATIVE_WEIGHTS", "RUNNER", "plan_file"]

LIBRARY = f"{CODE}libdvx.so"
"""The kernels and the C runtime."""

RUNNER = f"{CODE}runner"
"""The static program that runs a plan and measures it."""

HEADER = f"{CODE}dvx.h"
"""The C API."""

NATIVE_WEIGHTS = f"{CODE}{WEIGHTS}"
"""All constants, as kernels read them."""


def plan_file(variant: str) -> str:
    """Return the file of the plan of a variant: `gated`, `dense` or `forced`."""
    return f"{CODE}{variant}.plan"
