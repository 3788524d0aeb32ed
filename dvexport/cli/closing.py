"""What `dvexport export` says when it is done of what its artifact will save, and of the backend that was taken."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dvexport.errors import DeviceError, DvexportError

if TYPE_CHECKING:
    from dvexport.bundle.manifest import Manifest
    from dvexport.run.savings import Savings
    from dvexport.targets.catalogue import Target

__all__ = ["backend_line", "next_line", "saved_lines"]


def saved_lines(saved: Savings | None, backend: str, device: Target) -> list[str]:
    """Return the line that says what a bundle's gates save, none for a model without gates.

    Args:
        saved: what `dvexport.run.savings` found.
        backend: the bundle's.
        device: what it is made for.
    """
    if saved is None:
        return []
    if len(saved.idle) == saved.gates:
        line = f"{saved.gates} gates masked: this artifact saves nothing on this target"
        return [line + _better(backend, device)]
    line = f"saves {max(saved.kept, 0):.0%} of the multiply-accumulates on its golden frames"
    if saved.idle:
        line += f", {max(saved.asked, 0):.0%} were not asked for: {len(saved.idle)} of {saved.gates} gates are masked"
        line += _better(backend, device)
    return [line]


def _better(backend: str, device: Target) -> str:
    """Return the advice to take a backend that follows more decisions on the same device, empty where there is none."""
    from dvexport.targets.discover import BACKENDS
    from dvexport.targets.registry import backend_of

    for name in sorted(BACKENDS, key=lambda name: backend_of(name).rank):
        if backend_of(name).rank >= backend_of(backend).rank:
            return ""
        try:
            backend_of(name).check(device, {})
        except DeviceError as error:
            return f"; --backend {name} does ({error.hint})"
        except DvexportError:
            continue
        return f"; --backend {name} does"
    return ""


def backend_line(backend: str, refused: Mapping[str, DvexportError]) -> str:
    """Return the line that says which backend was taken where none was named, and why none that saves more."""
    reasons = [
        f"{error.what}: {error.hint}" if isinstance(error, DeviceError) else error.what for error in refused.values()
    ]
    because = "; ".join(reasons) or "of those that are installed, it saves most on this target"
    return f"backend: {backend} ({because})"


def next_line(manifest: Manifest, path: Path, device: Target) -> str:
    """Return the line that says what to do next: machine code of another processor is verified on the device."""
    from dvexport.bundle.trust import has_code
    from dvexport.targets.catalogue import runs_here

    if has_code(manifest) and not runs_here(device.cpu):
        return f"next: copy it to the device, and there: dvexport verify {path.name} --trust"
    return f"next: dvexport verify {path}"
