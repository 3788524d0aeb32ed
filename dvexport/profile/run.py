"""Profile a bundle: measure it beside its dense version, and put everything told of it together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dvexport.decisions import ACTION, OVER, TILES, TOKENS, Action
from dvexport.dialect.flops import ExecutedFlops, FlopTable
from dvexport.errors import DeviceError, UsageError, unknown_name
from dvexport.numbers import MOST_RUNS, whole_number
from dvexport.profile.clip import ProfileClip, load_clip
from dvexport.profile.environment import device_info
from dvexport.profile.measure import Measured, interleaved, random_decisions, warm_up
from dvexport.profile.result import (
    GateStats,
    GateStep,
    Method,
    MinMeanMax,
    ProfileResult,
    StepStats,
    StepTimes,
)
from dvexport.profile.token_stages import token_stages
from dvexport.run.classes import best_class
from dvexport.run.feeds import at
from dvexport.run.finite import check_finite
from dvexport.run.open import open_variant, variant_of
from dvexport.run.session import Decisions, Session, Step
from dvexport.targets.registry import backend_of
from dvexport.targets.runtime import Variant
from dvexport.targets.times import NodeTimes

if TYPE_CHECKING:
    from dvexport.bundle.archive import Bundle
    from dvexport.bundle.manifest import GateEntry, Manifest

__all__ = ["profile"]

DEFAULT_RUNS = 10
_RECORDED_FRAMES = 12
"""Frames of a stream recorded node by node; whole clips are recorded whole."""
_RECORDED_PASSES = 6
"""How often they are recorded. The first pass is a warm-up, and one outlier moves no median of the rest."""

_Progress = Callable[[str], None]


def profile(
    bundle: Bundle,
    *,
    clip: str | Path | None = None,
    device: str = "local",
    threads: int = 1,
    force: Mapping[str, float] | None = None,
    runs: int | None = None,
    warmup_s: float = 1.0,
    inputs: str | Path | Mapping[str, np.ndarray] | None = None,
    progress: _Progress | None = None,
) -> ProfileResult:
    """Measure a bundle beside the dense version of the same model, interleaved in one run.

    Times are those inside the runtime, node times those of a run of their own, since recording slows
    the runtime down.

    Args:
        clip: a video; by default the bundle's golden frames.
        device: `local`.
        threads: how many the runtime starts.
        force: rates of `channels` and `tiles`, 0 to 1, of random decisions to measure with instead of the
            model's own; a kind left out is computed everywhere. `tokens` takes 1 alone, for as many at random as
            the model keeps. Empty or None: the model decides.
        runs: passes over the clip, 10 by default.
        warmup_s: seconds that both run before anything is measured.
        inputs: the inputs beside the clip's video: an .npz file, or arrays by name, one row a frame.
        progress: called with the name of each step as it begins.

    Raises:
        UsageError: rates or runs that are none, or a model without the kind of decision forced.
        ClipError, BundleError: a file that can't be read.
        DeviceError: a device that is not available; ONNX Runtime is missing or fails.
    """
    tell = progress or (lambda _: None)
    rates = dict(force or {})
    repeats = DEFAULT_RUNS if runs is None else runs
    _check_request(bundle.manifest, device, rates, repeats)
    tell("read the clip")
    played = load_clip(bundle, clip, inputs)
    tell("make the dense version")
    manifest = bundle.manifest
    convolving = [gate for gate in manifest.gates if gate.kind != TOKENS.over]
    gates = [gate.name for gate in convolving]
    gated_model, dense_model = variant_of(bundle, "forced" if rates else "gated"), variant_of(bundle, "dense")
    gated, dense = (open_variant(model, manifest, threads=threads) for model in (gated_model, dense_model))
    forced = _forced(manifest, gated, rates, len(played.frames)) if rates else None
    tell("warm up")
    warmup = warm_up(gated, dense, played.feeds, forced, warmup_s)
    tell(f"measure {repeats} x {len(played.frames)} frames, gated and dense in turn")
    device_state = device_info(threads, backend_of(manifest.backend).runtime(manifest), manifest.target)
    measured, measured_dense = interleaved(gated, dense, played.feeds, forced, repeats)
    for index, step in enumerate(measured.steps):
        feeds = played.feeds if gated.mode == "clip" else at(played.feeds, slice(index, index + 1))
        check_finite(bundle, step, index, feeds)
    tell("time every node")
    recordings = _recorded(manifest, threads, played, ((gated_model, forced), (dense_model, None)))
    nodes, dense_nodes = (
        model.times(recording, gates, dense_model, _RECORDED_PASSES)
        for model, recording in zip((gated_model, dense_model), recordings, strict=True)
    )
    flops = FlopTable.from_dict(manifest.flops)
    executed = flops.executed([step.decisions for step in measured.steps])
    return ProfileResult(
        model=manifest.model.name,
        target=manifest.target,
        backend=manifest.backend,
        mode=manifest.mode,
        clip=played.info,
        device=device_state,
        method=Method(warmup, repeats),
        forced=rates or None,
        gated=StepTimes(measured.samples_ms),
        dense=StepTimes(measured_dense.samples_ms),
        steps=_steps(manifest, convolving, measured, executed, flops),
        gates=[_gate_stats(gate, executed, flops, nodes, dense_nodes) for gate in convolving],
        nodes=nodes.nodes,
        tokens=token_stages(manifest, measured.steps[0].decisions),
        tokens_ms=nodes.gate_ms.get(TOKENS.name),
        whole_clip=gated.whole_clip,
    )


def _check_request(manifest: Manifest, device: str, rates: Mapping[str, float], runs: int) -> None:
    if device != "local":
        raise DeviceError(f"profiling on '{device}' is not available in this release", hint="device='local'")
    whole_number(runs, "runs", least=1, most=MOST_RUNS)
    for kind, rate in rates.items():
        if kind not in OVER:
            raise unknown_name("kind of decision", kind, OVER)
        if not 0 <= rate <= 1:
            raise UsageError(f"a rate is from 0 to 1, not {rate}", where=kind)
        if kind == TOKENS.over and rate != 1:
            raise UsageError(
                f"tokens can't be forced at a rate of {rate:g}",
                why="how many go on is fixed when the model is exported",
                hint="tokens=1 draws as many at random; export with another sta.r for another rate",
            )
        if not any(kind in gate.kind.split("+") for gate in manifest.gates):
            raise UsageError(f"the model decides over no {kind}", where=manifest.model.name)


def _forced(manifest: Manifest, session: Session, rates: Mapping[str, float], frames: int) -> list[Decisions]:
    tokens = {gate.name: gate.tokens[1] for gate in manifest.gates if gate.tokens is not None}
    return random_decisions(session.decisions, rates, 1 if session.whole_clip else frames, tokens=tokens)


def _recorded(
    manifest: Manifest,
    threads: int,
    played: ProfileClip,
    sides: Sequence[tuple[Variant, Sequence[Decisions] | None]],
) -> list[Any]:
    """Return the recording of each side, with the decisions it is given, over a few frames; they take turns."""
    sessions = [open_variant(model, manifest, threads=threads, profile=True) for model, _ in sides]
    count = len(played.frames) if manifest.mode == "clip" else min(_RECORDED_FRAMES, len(played.frames))
    frames = at(played.feeds, slice(count))
    for _ in range(_RECORDED_PASSES):
        for session, (_, forced) in zip(sessions, sides, strict=True):
            session.run_clip(frames, forced[:count] if forced else None)
    return [session.runtime.end_profile() for session in sessions]


def _steps(
    manifest: Manifest, gates: Sequence[GateEntry], measured: Measured, executed: ExecutedFlops, flops: FlopTable
) -> list[StepStats]:
    outputs = manifest.declared_outputs
    medians = np.median(measured.frame_ms, axis=0)
    steps = []
    for t, step in enumerate(measured.steps):
        best = best_class(step, outputs)
        steps.append(
            StepStats(
                frame=t,
                latency_ms=float(medians[t]),
                executed_macs=executed.frames[t],
                dense_macs=flops.dense,
                gates={gate.name: _gate_step(gate, step) for gate in gates},
                label=None if best is None else best[0],
                prob=None if best is None else best[1],
            )
        )
    return steps


def _gate_step(gate: GateEntry, step: Step) -> GateStep:
    action = step.decisions.get((gate.name, ACTION.name), np.full(gate.channels, Action.COMPUTE))
    skip, reuse, compute = (int((action == kind).sum()) for kind in (Action.SKIP, Action.REUSE, Action.COMPUTE))
    tiles = step.decisions.get((gate.name, TILES.name))
    if tiles is None:
        return GateStep(skip, reuse, compute)
    return GateStep(skip, reuse, compute, int(tiles.sum()), tiles.size, tiles.astype(int).tolist())


def _gate_stats(
    gate: GateEntry, executed: ExecutedFlops, flops: FlopTable, nodes: NodeTimes, dense: NodeTimes
) -> GateStats:
    return GateStats(
        gate=gate.name,
        lowering=gate.lowering,
        reason=gate.reason,
        channels=gate.channels,
        grid=gate.grid,
        executed_gmacs=MinMeanMax.of([macs / 1e9 for macs in executed.gates[gate.name]]),
        dense_gmacs=flops.dense_of(gate.name) / 1e9,
        median_ms=nodes.gate_ms.get(gate.name),
        dense_median_ms=dense.gate_ms.get(gate.name),
        expected_ms=dict(gate.expected_ms),
    )
