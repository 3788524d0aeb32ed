"""Check that a bundle's artifact computes what the model does, on this machine.

Four independent witnesses: the golden data in the bundle (PyTorch's results at export), the gate-level
oracle in the bundle (every gate by its specification), the other mode of the same model (a stream must
end where the clip ends), and PyTorch itself where the model can be built again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dvexport.compare import Difference, Row, compare, error_row, first_difference, logits_error
from dvexport.errors import BundleError, TraceError, UsageError
from dvexport.golden import torch_steps, unpack
from dvexport.graph import whole_clip_of
from dvexport.oracle import Oracle
from dvexport.session import Session, Step, open_session, plan_of, read_gate_level, session_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from dvexport.bundle import Bundle
    from dvexport.bundle_manifest import Manifest

__all__ = ["VerifyReport", "verify"]


@dataclass(frozen=True)
class VerifyReport:
    """What was compared.

    Attributes:
        rows: (name, value, limit, ok); `value` may be at most `limit`.
        difference: the first gate and frame that decided otherwise; None if none did.
        notes: what could not be compared, and why.
    """

    rows: list[Row]
    difference: Difference | None = None
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(row.ok for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "ok": self.ok,
            "rows": [row._asdict() for row in self.rows],
            "first_difference": None if self.difference is None else self.difference.to_dict(),
            "notes": list(self.notes),
        }


def verify(bundle: Bundle, *, clip: str | Path | None = None, checkpoint: str | Path | None = None) -> VerifyReport:
    """Compare a bundle's artifact with its golden data, its oracle, its other mode and PyTorch.

    Args:
        clip: a video to compare on, beside the golden data; by default the golden frames.
        checkpoint: the weights that the bundle was exported from, to build the PyTorch model again.
            Models that ship with weights, or were exported without any, need none.

    Raises:
        UsageError: `checkpoint` is not the one that the bundle was made from.
        CheckpointError, ClipError: a file that can't be read.
        BundleError: golden data or the gate-level model is missing or unreadable.
        DeviceError: ONNX Runtime is missing or fails.
    """
    manifest = bundle.manifest
    if checkpoint is not None:
        _check_digest(manifest, checkpoint)
    session = open_session(bundle)
    golden_frames, golden_steps = _golden(bundle)
    on_golden = session.run_clip(golden_frames)
    pairs = [("golden data", on_golden, golden_steps)]
    frames, got = golden_frames, on_golden
    if clip is not None:
        frames = _clip_frames(clip, manifest)
        got = session.run_clip(frames)
    gate_level = read_gate_level(bundle)
    pairs.append(("gate-level oracle", got, Oracle(gate_level).run_clip(frames, follow=got)))
    net, why_not = _rebuilt(manifest, checkpoint)
    if net is not None:
        pairs.append(("PyTorch", got, torch_steps(net, frames, follow=got)))
    rows = [row for name, mine, theirs in pairs for row in compare(name, mine, theirs)]
    rows.append(_repeat_row(session, frames, got))
    mode_row, no_mode = _other_mode(gate_level, manifest, frames, got)
    rows += mode_row
    found = (first_difference(mine, theirs) for _, mine, theirs in pairs)
    return VerifyReport(rows, next((d for d in found if d), None), tuple(filter(None, (why_not, no_mode))))


def _golden(bundle: Bundle) -> tuple[np.ndarray, list[Step]]:
    try:
        return unpack(bundle.golden())
    except KeyError as error:
        raise BundleError("the golden data is incomplete", where=str(bundle.path), why=f"no {error}") from error


def _clip_frames(clip: str | Path, manifest: Manifest) -> np.ndarray:
    """Return as many frames as a clip of the model has, in either mode."""
    from dvexport.video import read_clip

    return read_clip(clip, manifest.preprocess).frames


def _repeat_row(session: Session, frames: np.ndarray, before: Sequence[Step]) -> Row:
    """After a reset nothing of the run before may be left: the results are equal to the bit."""
    return error_row("again after a reset: logits", logits_error(session.run_clip(frames), before), limit=0.0)


def _other_mode(
    gate_level: ir.Model, manifest: Manifest, frames: np.ndarray, got: Sequence[Step]
) -> tuple[list[Row], str | None]:
    """Compare with the same model lowered for the other mode; nothing where it can't stream."""
    from dataclasses import replace

    if whole_clip_of(gate_level) is not None:
        return [], "no stream to compare with: the model reads a clip as one"
    mode = "clip" if manifest.mode == "stream" else "stream"
    # Lowerings differ between the modes (channels can't be lowered in a clip): masked is always legal.
    plan = replace(plan_of(manifest, "gated"), mode=mode, frames=len(frames), variant="masked", overrides={})
    try:
        other = session_of(gate_level, plan).run_clip(frames)
    except TraceError as error:
        return [], f"no stream to compare with: {error.what}"
    return [error_row(f"{manifest.mode} against {mode}: logits", logits_error(got, other))], None


def _check_digest(manifest: Manifest, checkpoint: str | Path) -> None:
    from dvexport.export import file_digest

    if manifest.checkpoint is None:
        raise UsageError("the bundle was not made from a checkpoint", hint="leave out --checkpoint")
    if file_digest(checkpoint) != manifest.checkpoint:
        raise UsageError(
            "this is not the checkpoint that the bundle was made from",
            where=str(checkpoint),
            why="its SHA-256 is not the one in the manifest",
        )


def _rebuilt(manifest: Manifest, checkpoint: str | Path | None) -> tuple[Any, str | None]:
    """Return the PyTorch model, or None and the reason why it can't be built."""
    if manifest.checkpoint is not None and checkpoint is None:
        return None, "not compared with PyTorch: give --checkpoint"
    try:
        from dvexport.export import build_model
    except ImportError as error:  # a device that only runs bundles has no torch
        return None, f"not compared with PyTorch: {error}"
    return build_model(manifest.model.name, checkpoint, _settings(manifest), assume_defaults=True).model, None


def _settings(manifest: Manifest) -> dict[str, Any]:
    """Return the options of the export, those that it assumed too: another version may have other defaults."""
    from dvexport.models import zoo

    entry = manifest.model
    known = zoo.options(entry.name)
    return {**{key: value for key, value in entry.assumed.items() if key in known}, **entry.settings}
