"""Advice in words: what in a profile is worth changing, and what its figures are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum

import numpy as np

from dvexport.passes.lowerings import KERNELS
from dvexport.profile.result import GateStats, GateStep, ProfileResult, StepTimes
from dvexport.targets.registry import backend_of

__all__ = ["Advice", "AdviceKind", "advise", "better_lowering", "decisions", "overhead_share"]

WIDE_SPREAD = 0.15
"""Interquartile range over median above which a median is not trusted."""
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

_ORDER = {"warning": 0, "hint": 1, "info": 2}


class AdviceKind(StrEnum):
    """What a piece of advice is about; scripts read this, people its text."""

    OTHER_PROCESSOR = "other-processor"
    """Measured on another kind of processor than the bundle is made for."""
    NO_DENSE = "no-dense"
    SLOWER = "slower-than-dense"
    """The whole gated artifact takes longer than the dense one."""
    LITTLE_ARRIVES = "little-arrives"
    """It is faster, but most of the speed-up that the decisions allow is lost."""
    FORCED = "forced"
    UNRELIABLE = "unreliable"
    """Steps of equal work take unequal time."""
    VARIED = "varied-work"
    """Gated steps spread, dense ones do not."""
    COSTLY = "gate-costs-more"
    """A gate takes longer than the same layers in the dense artifact."""
    LOSSY = "gate-saves-less"
    """A gate saves time, but much less than its FLOPs allow."""
    UNUSED = "saving-unused"
    """The lowering of a gate computes what its decisions leave out."""
    NEVER_SKIPS = "never-skips"
    ALWAYS_SKIPS = "always-skips"
    DECIDING = "deciding-costs"
    """Policies, masks or the choice of tokens take a large share of a step."""
    NO_GATES = "no-gates"
    """The dense artifact is the same network."""
    NOTHING = "nothing"
    """Nothing stands out."""


@dataclass(frozen=True)
class Advice:
    """One piece of advice.

    Attributes:
        kind: what it is about.
        severity: `warning`, `hint` or `info`.
        gate: the gate that it is about; None: the whole, or several gates.
        text: for people.
        lowering: what the gate is proposed to be lowered as instead; None: nothing else.
    """

    kind: AdviceKind
    severity: str
    gate: str | None
    text: str
    lowering: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """Return the JSON form."""
        return asdict(self)


Rule = Callable[[ProfileResult], Iterator[Advice]]


def advise(result: ProfileResult) -> list[Advice]:
    """Return the advice for `result`, the most severe first; never empty."""
    found = [advice for rule in _RULES for advice in rule(result)]
    if not any(advice.severity != "info" for advice in found):
        found.append(Advice(AdviceKind.NOTHING, "info", None, "No gate costs more than it saves; nothing stands out."))
    return sorted(found, key=lambda advice: _ORDER[advice.severity])


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
            f"{gate.dense_median_ms:.2f} ms dense){_overhead_text(result, gate.gate)}. "
            + _change(gate.lowering, better),
            better,
        )


def _proposed(result: ProfileResult, gate: GateStats) -> str | None:
    """Return the lowering that would change something for the better, or None."""
    better = better_lowering(result, gate)
    same = better == gate.lowering or (gate.lowering in NOT_SAVING and better in NOT_SAVING)
    return None if same else better


def _change(present: str, better: str | None) -> str:
    if present == KERNELS:
        return "Its kernels follow every decision already: it pays on a larger layer, or with sparser decisions."
    if better is None:
        return (
            "No lowering of this target promises to be cheaper: it pays on a larger layer, or with sparser decisions."
        )
    return f"Try it with the lowering '{better}' in place of '{present}' (--lowering GATE={better})."


def _overhead_text(result: ProfileResult, gate: str) -> str:
    share = overhead_share(result, gate)
    if share is None or share <= HIGH_OVERHEAD:
        return ""
    return f"; {share:.0%} of its time decides and moves data, not convolves"


def _low_realisation(result: ProfileResult) -> Iterator[Advice]:
    """The gates that lose most of what their decisions allow, though they are faster than dense."""
    losses: list[tuple[float, GateStats]] = []
    for gate in result.gates:
        if gate.median_ms is None or gate.dense_median_ms is None or gate.lowering in NOT_SAVING:
            continue
        low = gate.realisation is not None and gate.realisation < LOW_REALISATION
        if low and gate.median_ms <= gate.dense_median_ms:
            losses.append((gate.median_ms - gate.dense_median_ms * gate.executed_fraction, gate))
    losses.sort(key=lambda pair: -pair[0])
    for loss, gate in losses[:NAMED]:
        better = _saving(result, gate)
        proposal = "" if better is None else f" Its decisions are sparser for '{better}': measure that."
        yield Advice(
            AdviceKind.LOSSY,
            "hint",
            gate.gate,
            f"Saves time, but {loss:.2f} ms a frame less than its FLOPs allow (realisation "
            f"{gate.realisation:.2f}{_overhead_text(result, gate.gate)}).{proposal}",
            better,
        )
    if others := [gate.gate for _, gate in losses[NAMED:]]:
        loss = sum(loss for loss, _ in losses[NAMED:])
        yield Advice(
            AdviceKind.LOSSY, "hint", None, f"The same holds, with {loss:.2f} ms in all, for {', '.join(others)}."
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
                    f"'{gate.lowering}' executes them all ({gate.reason}). Measure it as '{better}'.",
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
                f"Never skips: all {frames} frames compute every channel and tile. Train it with a stronger "
                "sparsity target, or leave its gate out of the model, which also drops the cost of deciding.",
            )
        if taken and all(s.compute + s.reuse == 0 or s.tiles_active == 0 for s in taken):
            yield Advice(
                AdviceKind.ALWAYS_SKIPS,
                "hint",
                gate.gate,
                f"Always skips: none of the {frames} frames computes anything. If other clips agree, the "
                "layer can be removed from the model.",
            )


def _policy_total(result: ProfileResult) -> Iterator[Advice]:
    nodes = [node for node in result.nodes if node.role != "control"]
    total = sum(node.median_us for node in nodes)
    deciding = sum(node.median_us for node in nodes if node.gate and node.role == "decide")
    if not total or deciding / total <= 0.05:
        return
    share = f"{deciding / total:.0%} of a step"
    if result.tokens:
        text = f"Choosing tokens takes {share}: fewer prunings, or a larger r at each, would give most of that back."
    else:
        text = (
            f"The gates' decisions (policy networks and masks) take {share}: a "
            "smaller hidden size or a shared policy would give most of that back."
        )
    yield Advice(AdviceKind.DECIDING, "hint", None, text)


def _whole(result: ProfileResult) -> Iterator[Advice]:
    if result.device.is_target is False:
        yield Advice(
            AdviceKind.OTHER_PROCESSOR,
            "warning",
            None,
            f"The bundle is made for {result.target}, and this is another kind of processor: what is told here of "
            "times and lowerings does not hold there.",
        )
    if result.realisation is None:
        yield Advice(
            AdviceKind.NO_DENSE, "info", None, "No dense artifact was measured: speed-up and realisation are unknown."
        )
    elif not result.gates and not result.tokens:
        text = "The model has no gates: there is nothing to skip, and the dense artifact is the same network."
        yield Advice(AdviceKind.NO_GATES, "info", None, text)
    elif result.speedup is not None and result.speedup < 1:
        text = f"The gated artifact is slower than the dense one (speed-up {result.speedup:.2f}): {_remedy(result)}."
        yield Advice(AdviceKind.SLOWER, "warning", None, text)
    elif result.realisation < LOW_REALISATION:
        yield Advice(
            AdviceKind.LITTLE_ARRIVES,
            "warning",
            None,
            f"Only {result.realisation:.0%} of the speed-up that the decisions allow arrives "
            f"({result.speedup:.2f} of {result.flop_ratio:.2f}).",
        )
    if result.forced:
        yield Advice(
            AdviceKind.FORCED,
            "info",
            None,
            "Decisions were forced to random ones: the times are real, the predictions mean nothing.",
        )


def _remedy(result: ProfileResult) -> str:
    if result.tokens and not result.gates:
        return "drop more tokens, or ship the dense one"
    return backend_of(result.backend).remedy


def _spread(result: ProfileResult) -> Iterator[Advice]:
    """A dense step does the same work each time, so its spread is the machine's alone; so does one over a clip."""
    machine = result.dense or result.gated
    if result.whole_clip:
        machine = max(machine, result.gated, key=lambda times: times.spread)
    if machine.spread > WIDE_SPREAD:
        yield Advice(AdviceKind.UNRELIABLE, "warning", None, _unreliable(result, machine))
    elif result.gated.spread > WIDE_SPREAD:
        yield Advice(
            AdviceKind.VARIED,
            "info",
            None,
            f"Gated steps spread by {result.gated.spread:.0%} while dense ones stay within "
            f"{machine.spread:.0%}: the frames ask for different work. Plan with P99 "
            f"({result.gated.p99:.2f} ms), not with the median.",
        )


def _unreliable(result: ProfileResult, times: StepTimes) -> str:
    device = result.device
    causes = []
    if device.governor and device.governor != "performance":
        causes.append(f"the CPU governor is '{device.governor}' (use 'performance')")
    if device.threads >= device.cores:
        causes.append(f"{device.threads} threads run on {device.cores} cores (use fewer)")
    because = "; ".join(causes) or "other processes or heat may be the cause"
    return f"The measurement is not reliable: repeated steps spread by {times.spread:.0%}; {because}."


_RULES: tuple[Rule, ...] = (
    _whole,
    _spread,
    _costly_gates,
    _low_realisation,
    _unused_savings,
    _constant_gates,
    _policy_total,
)
