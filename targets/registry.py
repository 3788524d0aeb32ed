"""The backends by name: how each makes an artifact of a traced model, and opens the one in a bundle."""

from __future__ import annotations

from dvexport.errors import UsageError, unknown_name
from dvexport.targets.backend import Backend
from dvexport.targets.onnx.backend import OnnxBackend
from dvexport.targets.tvm.backend import TvmBackend

__all__ = ["BACKENDS", "backend_of"]


BACKENDS: dict[str, Backend] = {"onnx": OnnxBackend(), "tvm": TvmBackend()}
LATER_BACKENDS = ("tflite",)


def backend_of(name: str) -> Backend:
    """Return a backend; UsageError if there is none of that name."""
    if name in LATER_BACKENDS:
        raise UsageError(f"backend '{name}' is not in this release", hint=f"one of: {', '.join(BACKENDS)}")
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    return BACKENDS[name]
