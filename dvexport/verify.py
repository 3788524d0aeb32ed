"""Check that a bundle's artifact computes what the model does, on this machine.

Four independent witnesses: the golden data in the bundle (PyTorch's results at export), the gate-level
oracle in the bundle (every gate by its specification), the other mode of the same model (a stream must
end where the clip ends), and PyTorch itself where the model can be built again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dvexport.bundle.levels import read_gate_level
from dvexport.bundle.slim import compare_with_whole
from dvexport.decisions import PROBE, TOKENS, decision_key
from dvexport.errors import BundleError, TraceError, UsageError
from dvexport.graph.graph import whole_clip_of
from dvexport.rebuild import rebuild
from dvexport.run.compare import Difference, Row, compare, first_difference, output_rows
from dvexport.run.feeds import Feeds, count, with_arrays
from dvexport.run.forced import ForcedRun
from dvexport.run.forced import unpack as unpack_forced
from dvexport.run.forced_check import NOT_FORCED, check_forced, references_of
from dvexport.run.golden import torch_steps, unpack
from dvexport.run.open import open_session, session_of
from dvexport.run.oracle import Oracle
from dvexport.run.seen import GateSeen, gates_seen
from dvexport.run.session import Decisions, Session, Step
from dvexport.targets.onnx.backend import plan_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

    from dvexport.bundle.archive import Bundle
    from dvexport.bundle.manifest import InputEntry, Manifest, OutputEntry

__all__ = ["VerifyReport", "verify"]


@dataclass(frozen=True)
class VerifyReport:
    """What was compared.

    Attributes:
        rows: (name, value, limit, ok); `value` may be at most `limit`.
        difference: the first gate and frame that decided otherwise; None if none did.
        notes: what could not be compared, and why.
        gates: what was seen of each gate.
    """

    rows: list[Row]
    difference: Difference | None = None
    notes: tuple[str, ...] = ()
    gates: tuple[GateSeen, ...] = ()

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
            "gates": [gate.to_dict() for gate in self.gates],
        }


def verify(
    bundle: Bundle,
    *,
    clip: str | Path | None = None,
    checkpoint: str | Path | None = None,
    model: str | nn.Module | None = None,
    settings: Mapping[str, Any] | None = None,
    inputs: str | Path | Mapping[str, np.ndarray] | None = None,
    whole: Bundle | None = None,
) -> VerifyReport:
    """Compare a bundle's artifact with its golden data, its oracle, its other mode and PyTorch.

    Args:
        clip: a video to compare on, beside the golden data; by default the golden frames.
        checkpoint: the weights that the bundle was exported from, to build the PyTorch model again.
            Models that ship with weights, or were exported without any, need none.
        model: what the bundle was made from, where that is no model of the zoo: `package.module:factory`, a directory
            or a module. A bundle's own word for it is neither imported nor opened.
        settings: options for that factory, the same as at export.
        inputs: the inputs beside the clip's video: an .npz file, or arrays by name, one row a frame.
        whole: for a slim bundle, the one that it was made of: it has what is compared with.

    Raises:
        UsageError: `checkpoint` or `settings` are not those that the bundle was made from.
        CheckpointError, ClipError: a file that can't be read.
        BundleError: golden data or the gate-level model is missing or unreadable.
        CheckFailed: the slim bundle was not made of the whole one.
        DeviceError: ONNX Runtime is missing or fails.
    """
    if whole is not None:
        compare_with_whole(bundle, whole)
        bundle = whole
    manifest = bundle.manifest
    # What may be refused is read first: compiled code of a bundle runs as soon as it is loaded.
    golden_frames, golden_steps = _golden(bundle)
    shapes = {name: array.shape[1:] for name, array in golden_frames.items()}
    results = {name: value.shape for name, value in golden_steps[0].outputs.items()}
    net, said = rebuild(manifest, model=model, checkpoint=checkpoint, settings=settings, inputs=shapes, outputs=results)
    gate_level = read_gate_level(bundle)
    runs = _forced_runs(bundle)
    session = open_session(bundle)
    on_golden = session.run_clip(golden_frames)
    pairs = [("golden data", on_golden, golden_steps)]
    frames, got = golden_frames, on_golden
    if clip is None and inputs is not None:
        raise UsageError("inputs are given without the video that they belong to", hint="give --clip too")
    if clip is not None:
        from dvexport.video.clips import read_clip

        frames = with_arrays(read_clip(clip, manifest.preprocess), list(frames), inputs, clip)
        got = session.run_clip(frames)
    pairs.append(("gate-level oracle", got, Oracle(gate_level).run_clip(frames, follow=got)))
    if net is not None:
        pairs.append(("PyTorch", got, torch_steps(net, frames, follow=got)))
    rows = [row for name, mine, theirs in pairs for row in compare(name, mine, theirs, manifest.limits)]
    rows += _repeat_rows(session, frames, got)
    forced_rows, compared, no_force = _forced(bundle, runs, gate_level, golden_frames, net)
    rows += forced_rows
    mode_row, no_mode = _other_mode(gate_level, manifest, frames, got)
    rows += mode_row
    found = (first_difference(mine, theirs) for _, mine, theirs in pairs)
    notes = (*said, *filter(None, (no_mode, no_force)))
    return VerifyReport(rows, next((d for d in found if d), None), notes, gates_seen(manifest.gates, got, compared))


def _golden(bundle: Bundle) -> tuple[Feeds, list[Step]]:
    manifest = bundle.manifest
    inputs, outputs = [entry.name for entry in manifest.inputs], [one.name for one in manifest.declared_outputs]
    try:
        frames, steps = unpack(bundle.golden(), inputs, outputs)
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:  # an array missing, empty or too short
        raise BundleError("the golden data is incomplete", where=str(bundle.path), why=repr(error)) from error
    if why := _golden_problem(manifest, frames, {name: bundle.golden()[name] for name in outputs}):
        raise BundleError("the golden data is incomplete", where=str(bundle.path), why=why)
    return frames, steps


def _golden_problem(manifest: Manifest, frames: Feeds, results: Feeds) -> str | None:
    """Return why golden arrays are not what the manifest says of its inputs and outputs; None if they are."""
    given = manifest.inputs[0].shape[0]
    whole = {entry.name: entry.shape[0] == 1 < given for entry in manifest.outputs}
    arrays = {**frames, **results}
    entries: list[InputEntry | OutputEntry] = [*manifest.inputs, *manifest.outputs]
    for entry in entries:
        array = arrays.get(entry.name)
        if array is None:
            continue  # decisions, which are compared where there are any
        rows = 1 if whole.get(entry.name) else count(frames)
        if not rows or array.shape != (rows, *entry.shape[1:]) or array.dtype != entry.dtype:
            wanted = f"{entry.dtype} {[rows or 'frames', *entry.shape[1:]]}"
            return f"'{entry.name}' is {array.dtype} {list(array.shape)}, and should be {wanted}"
    if any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in arrays.values()):
        return "it has NaN or infinite values"
    return None


def _repeat_rows(session: Session, frames: Feeds, before: Sequence[Step]) -> list[Row]:
    """After a reset nothing of the run before may be left: the results are equal to the bit."""
    return output_rows("again after a reset", session.run_clip(frames), before, limits=None)


def _forced_runs(bundle: Bundle) -> list[ForcedRun]:
    """Return the forced steps of the golden data; BundleError if there should be some and are none."""
    outputs = [output.name for output in bundle.manifest.declared_outputs]
    runs = unpack_forced(bundle.golden(), where=str(bundle.path), outputs=outputs)
    if not runs and any(gate.seen is not None and gate.seen.forced is not None for gate in bundle.manifest.gates):
        raise BundleError("the golden data is incomplete", where=str(bundle.path), why="it has no forced steps")
    return runs


def _forced(
    bundle: Bundle, runs: Sequence[ForcedRun], gate_level: ir.Model, frames: Feeds, net: Any
) -> tuple[list[Row], list[list[Decisions]] | None, str | None]:
    """Compare under forced decisions: the rows, the decisions compared (None: none were), and what could not be."""
    if not runs:
        forceable = any(gate.kind != "tokens" for gate in bundle.manifest.gates)
        return [], None, NOT_FORCED if forceable else None
    session = open_session(bundle, variant="forced")
    probes = {key: one.shape[1:] for one in bundle.manifest.outputs if (key := decision_key(one.name, PROBE))}
    shown = {key: shape for key, shape in probes.items() if key[1] != TOKENS.name}
    if any({key: value.shape for key, value in run.decisions[0].items()} != shown for run in runs):
        why = "its forced decisions are not those of the gates"
        raise BundleError("the golden data is damaged", where=str(bundle.path), why=why)
    stored = {id(run): run.steps() for run in runs}
    references = references_of(gate_level, frames, net) | {"golden data": lambda run: stored[id(run)]}
    try:
        found = check_forced(session, runs, frames, references, bundle.manifest.limits)
    except UsageError as error:  # raised by the bundle's own decisions
        raise BundleError("the golden data is damaged", where=str(bundle.path), why=str(error)) from error
    return [row for rows in found.rows.values() for row in rows], found.decisions, found.note(references)


def _other_mode(
    gate_level: ir.Model, manifest: Manifest, frames: Feeds, got: Sequence[Step]
) -> tuple[list[Row], str | None]:
    """Compare with the same model lowered for the other mode; nothing where it can't stream."""
    from dataclasses import replace

    if whole_clip_of(gate_level) is not None:
        return [], "no stream to compare with: the model reads a clip as one"
    mode = "clip" if manifest.mode == "stream" else "stream"
    # Lowerings differ between the modes (channels can't be lowered in a clip): masked is always legal.
    plan = replace(plan_of(manifest, "gated"), mode=mode, frames=count(frames), variant="masked", overrides={})
    try:
        other = session_of(gate_level, plan).run_clip(frames)
    except TraceError as error:
        return [], f"no stream to compare with: {error.what}"
    return output_rows(f"{manifest.mode} against {mode}", got, other, manifest.limits), None
