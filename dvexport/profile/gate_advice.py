"""Advice about single gates: what each costs and saves, and what else it could be lowered as."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dvexport.passes.lowerings import KERNELS
from dvexport.profile.advice_kinds import Advice, AdviceKind, Rule, unreliable
from dvexport.profile.result import GateStats, GateStep, ProfileResult

__all__ = ["GATE_RULES", "LOW_REALISATION", "NOT_SAVING", "better_lowering", "decisions", "overhead_share"]

LOW_REALISATION = 0.6
"""Below this, less than 60 % of the speed-up that the decisions allow arrives."""
HIGH_OVERHEAD = 0.35
"""Share of a gate's time outside its convolutions above which it is named."""
SPARSE = 0.75
"""A lowering is proposed only where at most this share of its unit (tile, channel) is executed."""

NOT_SAVING = ("masked", "dense")
"""Lowerings that execute everything, whatever the decision."""
_UNITS = {"winograd2": "tiles", "winograd4": "tiles", "channels": "groups"}
"""Lowerings that save by the same unit as another one."""
NAMED = 3
"""Gates of one kind that are named one by one; the rest is summed up."""


def decisions(result: ProfileResult, gate: str) -> list[GateStep]:
    """Return what `gate` decided, frame by frame."""
    return [step.gates[gate] for step in result.steps if gate in step.gates]


def better_lowering(result: ProfileResult, gate: GateStats) -> str:
    """Return the lowering that promises most over the gate's present one, or the present one if none does.

    Where the target's cost table spoke at export (`expected_ms`), the cheapest other lowering is it, if it
    was expected to take less than the present one was measured to take. Without a table the decisions
    speak: `tiles` saves by active tiles, `groups` by computed channels. The other one is proposed where its
    unit is sparse, and sparser than the present lowering's; else `masked` (dense, then mask), which
    costs little more than dense does.
    """
    if gate.lowering == KERNELS:  # these follow every decision, there is nothing to choose
        return gate.lowering
    if gate.expected_ms:
        others = {name: ms for name, ms in gate.expected_ms.items() if name != gate.lowering}
        best = min(others, key=lambda name: others[name], default=gate.lowering)
        promising = gate.median_ms is None or others.get(best, float("inf")) < gate.median_ms
        return best if promising else gate.lowering
    taken = decisions(result, gate.gate)
    if not taken:
        return "masked"
    shares = {"groups": float(np.mean([step.compute_share for step in taken]))}
    if gate.grid is not None:
        shares["tiles"] = float(np.mean([step.tile_share for step in taken]))
    present = shares.pop(_UNITS.get(gate.lowering, gate.lowering), 1.0)
    best = min(shares, key=lambda name: shares[name], default="masked")
    return best if shares.get(best, 1.0) <= min(SPARSE, present) else "masked"


def overhead_share(result: ProfileResult, gate: str) -> float | None:
    """Return the share of the gate's node time spent deciding and moving data, not convolving.

    Control nodes are left out (they enclose their branches). None where no node time is known.
    """
    nodes = [node for node in result.nodes if node.gate == gate and node.role != "control"]
    total = sum(node.median_us for node in nodes)
    if not total:
        return None
    return sum(node.median_us for node in nodes if node.role in ("decide", "move")) / total


def _costly_gates(result: ProfileResult) -> Iterator[Advice]:
    """Gates that take longer than the same layers in the dense artifact."""
    if unreliable(result):
        return
    for gate in result.gates:
        if gate.median_ms is None or gate.dense_median_ms is None or gate.median_ms <= gate.dense_median_ms:
            continue
        loss = gate.median_ms - gate.dense_median_ms
        better = _proposed(result, gate)
        yield Advice(
            AdviceKind.COSTLY,
            "warning",
            gate.gate,
            f"The gate costs {loss:.2f} ms a frame more than it saves ({gate.median_ms:.2f} ms gated, "
            f"{gate.dense_median_ms:.2f} ms dense){_overhead_text(result, gate.gate)}.",
            _change(gate, better),
            better,
        )


def _proposed(result: ProfileResult, gate: GateStats) -> str | None:
    """Return the lowering that would change something for the better, or None."""
    better = better_lowering(result, gate)
    same = better == gate.lowering or (gate.lowering in NOT_SAVING and better in NOT_SAVING)
    return None if same else better


def _change(gate: GateStats, better: str | None) -> str:
    if better is not None:
        return f"Try the lowering '{better}' in place of '{gate.lowering}': --lowering {gate.gate}={better}."
    why = "its kernels follow every decision already" if gate.lowering == KERNELS else "no lowering promises more"
    return f"Train it with sparser decisions, or leave it out of the model, since {why}; larger layers pay sooner."


def _overhead_text(result: ProfileResult, gate: str) -> str:
    share = overhead_share(result, gate)
    if share is None or share <= HIGH_OVERHEAD:
        return ""
    return f"; {share:.0%} of its time decides and moves data, not convolves"


def _low_realisation(result: ProfileResult) -> Iterator[Advice]:
    """The gates that lose most of what their decisions allow, though they are faster than dense.

    Only those are told of that another lowering may serve better: about the others there is nothing to do.
    """
    losses: list[tuple[float, GateStats, str]] = []
    for gate in () if unreliable(result) else result.gates:
        if gate.median_ms is None or gate.dense_median_ms is None or gate.lowering in NOT_SAVING:
            continue
        low = gate.realisation is not None and gate.realisation < LOW_REALISATION
        better = _saving(result, gate)
        if low and better is not None and gate.median_ms <= gate.dense_median_ms:
            losses.append((gate.median_ms - gate.dense_median_ms * gate.executed_fraction, gate, better))
    losses.sort(key=lambda loss: -loss[0])
    for loss, gate, better in losses[:NAMED]:
        yield Advice(
            AdviceKind.LOSSY,
            "hint",
            gate.gate,
            f"Saves time, but {loss:.2f} ms a frame less than its FLOPs allow (realisation "
            f"{gate.realisation:.2f}{_overhead_text(result, gate.gate)}).",
            f"Its decisions are sparser for '{better}': measure that, --lowering {gate.gate}={better}.",
            better,
        )
    if others := losses[NAMED:]:
        yield Advice(
            AdviceKind.LOSSY,
            "hint",
            None,
            f"The same holds, with {sum(loss for loss, _, _ in others):.2f} ms in all, for {len(others)} more.",
            "Measure " + ", ".join(f"{gate.gate}={better}" for _, gate, better in others) + ".",
        )


def _saving(result: ProfileResult, gate: GateStats) -> str | None:
    """Return another lowering that leaves something out, or None."""
    better = better_lowering(result, gate)
    return None if better in ("masked", gate.lowering) else better


def _unused_savings(result: ProfileResult) -> Iterator[Advice]:
    """Gates that save FLOPs on paper while the lowering computes everything."""
    for gate in result.gates:
        if gate.lowering in NOT_SAVING and 0 < gate.executed_fraction < 0.4:
            better = _saving(result, gate)
            if better is not None:
                yield Advice(
                    AdviceKind.UNUSED,
                    "hint",
                    gate.gate,
                    f"Only {gate.executed_fraction:.0%} of its FLOPs are needed, but the lowering "
                    f"'{gate.lowering}' executes them all ({gate.reason}).",
                    f"Measure it as '{better}': --lowering {gate.gate}={better}.",
                    better,
                )


def _constant_gates(result: ProfileResult) -> Iterator[Advice]:
    """Gates whose decision never changes are work without use. Forced decisions say nothing of it."""
    if result.forced:
        return
    frames = len(result.steps)
    for gate in result.gates:
        taken = decisions(result, gate.gate)
        if taken and all(s.compute == s.channels and s.tiles_active == s.tiles_total for s in taken):
            yield Advice(
                AdviceKind.NEVER_SKIPS,
                "hint",
                gate.gate,
                f"Never skips: all {frames} frames compute every channel and tile.",
                "Train it with a stronger sparsity target, or leave its gate out of the model, which also drops the "
                "cost of deciding.",
            )
        if taken and all(s.compute + s.reuse == 0 or s.tiles_active == 0 for s in taken):
            yield Advice(
                AdviceKind.ALWAYS_SKIPS,
                "hint",
                gate.gate,
                f"Always skips: none of the {frames} frames computes anything.",
                "Profile other clips; if they agree, remove the layer from the model.",
            )


GATE_RULES: tuple[Rule, ...] = (_costly_gates, _low_realisation, _unused_savings, _constant_gates)
