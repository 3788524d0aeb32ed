"""Open a bundle: the variant that ships, or one made of its gate-level model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dvexport.decisions import PROBE, decision_key
from dvexport.errors import BundleError, unknown_name
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
        BundleError: the bundle changed meanwhile, lacks the model, or has inputs and outputs that its manifest does not
            describe.
        DeviceError: the backend's runtime is missing or can't load the artifact.
    """
    session = open_variant(variant_of(bundle, variant), bundle.manifest, threads=threads)
    try:
        _check_ports(bundle, session)
    except BundleError:
        session.close()
        raise
    return session


def _check_ports(bundle: Bundle, session: Session) -> None:
    """Refuse an artifact that takes or gives something else than the manifest says."""
    shown = [entry for entry in bundle.manifest.outputs if decision_key(entry.name, PROBE) is None]
    for kind, told, ports in (("input", bundle.manifest.inputs, session.inputs), ("output", shown, session.outputs)):
        said = {entry.name: (tuple(entry.shape), entry.dtype) for entry in told}
        found = {name: (tuple(int(size) for size in port.shape), str(port.dtype)) for name, port in ports.items()}
        for name in {**said, **found}:
            if said.get(name) != found.get(name):
                why = f"the manifest says {_told(said.get(name))}, the artifact {_told(found.get(name))}"
                raise BundleError(f"the artifact has another {kind} '{name}'", where=str(bundle.path), why=why)


def _told(port: tuple[tuple[int, ...], str] | None) -> str:
    return "none" if port is None else f"{port[1]} {list(port[0])}"


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
