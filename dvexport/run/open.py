"""Open a bundle: the variant that ships, or one made of its gate-level model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dvexport.errors import unknown_name
from dvexport.run.session import Session
from dvexport.targets.onnx.backend import onnx_variant
from dvexport.targets.registry import backend_of
from dvexport.targets.runtime import Variant

if TYPE_CHECKING:
    import onnx_ir as ir

    from dvexport.bundle.archive import Bundle
    from dvexport.bundle.manifest import Manifest
    from dvexport.passes.pipeline import Request

__all__ = ["VARIANTS", "open_session", "open_variant", "session_of", "variant_of"]

VARIANTS = ("gated", "dense", "forced")


def open_session(bundle: Bundle, *, threads: int = 1, variant: str = "gated") -> Session:
    """Open a bundle for running on this machine, at the first frame of a stream.

    Args:
        threads: how many the runtime starts: 1 to what a native plan is laid out for, or to what ONNX Runtime takes
            here.
        variant: `gated` (what ships), `dense` or `forced`.

    Raises:
        UsageError: an unknown variant, more threads than that, or a backend that can't run here.
        BundleError: the bundle changed meanwhile, or lacks the model.
        DeviceError: the backend's runtime is missing or can't load the artifact.
    """
    return open_variant(variant_of(bundle, variant), bundle.manifest, threads=threads)


def variant_of(bundle: Bundle, variant: str) -> Variant:
    """Return a variant of a bundle; errors as `open_session`."""
    if variant not in VARIANTS:
        raise unknown_name("variant", variant, VARIANTS)
    return backend_of(bundle.manifest.backend).variant(bundle, variant)


def open_variant(variant: Variant, manifest: Manifest, *, threads: int = 1, profile: bool = False) -> Session:
    """Open a variant; with `profile`, every node's time is recorded for `runtime.end_profile()`.

    Raises:
        UsageError: more threads than the runtime takes.
        DeviceError: the runtime is missing or can't load it.
    """
    runtime = variant.open(threads=threads, profile=profile)
    return Session(runtime, mode=manifest.mode, labels=manifest.labels)


def session_of(gate_level: ir.Model, plan: Request, *, threads: int = 1) -> Session:
    """Lower a gate-level model for ONNX Runtime as `plan` says and open it; errors as `open_session` and `lower`."""
    return Session(onnx_variant(gate_level, plan).open(threads=threads), mode=plan.mode)
