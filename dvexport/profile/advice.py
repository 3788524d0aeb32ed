"""Advice in words: what in a profile is worth changing, and what its figures are worth."""

from __future__ import annotations

from collections.abc import Iterator

from dvexport.profile.advice_kinds import WIDE_SPREAD, Advice, AdviceKind, Rule, unreliable
from dvexport.profile.gate_advice import GATE_RULES, LOW_REALISATION
from dvexport.profile.result import ProfileResult
from dvexport.targets.registry import backend_of

__all__ = ["Advice", "AdviceKind", "advise"]

MUCH_DECIDING = 0.05
"""Share of a step above which taking decisions is told of."""
MUCH_OUTSIDE = 0.35
"""Share of a step above which the layers that belong to no gate are told of."""
_ORDER = {"warning": 0, "hint": 1, "info": 2}


def advise(result: ProfileResult) -> list[Advice]:
    """Return the advice for `result`, the most severe first; never empty."""
    found = [advice for rule in _RULES for advice in rule(result)]
    if not any(advice.severity != "info" for advice in found):
        text = "No gate costs more than it saves; nothing stands out."
        found.append(Advice(AdviceKind.NOTHING, "info", None, text, ""))
    return sorted(found, key=lambda advice: _ORDER[advice.severity])


def _deciding(result: ProfileResult) -> Iterator[Advice]:
    nodes = [node for node in result.nodes if node.role != "control"]
    total = sum(node.median_us for node in nodes)
    deciding = sum(node.median_us for node in nodes if node.gate and node.role == "decide")
    if not total or deciding / total <= MUCH_DECIDING:
        return
    share = f"{deciding / total:.0%} of a step"
    if result.tokens:
        text, act = f"Choosing tokens takes {share}.", "Prune at fewer places, or by a larger r at each."
    else:
        text = f"The gates' decisions (policy networks and masks) take {share}."
        act = "Give the policies fewer hidden units, or let gates of equal shape share one."
    yield Advice(AdviceKind.DECIDING, "hint", None, text, act)


def _outside(result: ProfileResult) -> Iterator[Advice]:
    """What no gate can save: the stem, the classifier, layers that were left ungated."""
    nodes = [node for node in result.nodes if node.role != "control"]
    outside = sorted((node for node in nodes if node.gate is None), key=lambda node: -node.median_us)
    total, ungated = (sum(node.median_us for node in some) for some in (nodes, outside))
    if not result.gates or not total or ungated / total <= MUCH_OUTSIDE:
        return
    first = outside[0]
    yield Advice(
        AdviceKind.OUTSIDE,
        "hint",
        None,
        f"{ungated / total:.0%} of a step ({ungated / 1e3:.2f} ms) belongs to no gate, most of it {first.node} "
        f"({first.op}, {first.median_us / 1e3:.2f} ms): no decision saves any of that.",
        "Put gates on these layers, or make them lighter: a smaller input, fewer channels.",
    )


def _whole(result: ProfileResult) -> Iterator[Advice]:
    if result.device.is_target is False:
        yield Advice(
            AdviceKind.OTHER_PROCESSOR,
            "warning",
            None,
            f"The bundle is made for {result.target}, and this is another kind of processor: what is told here of "
            "times and lowerings does not hold there.",
            "Profile on the device before you decide by it, or export for this machine: --target host.",
        )
    if result.realisation is None:
        yield Advice(
            AdviceKind.NO_DENSE,
            "info",
            None,
            "No dense artifact was measured: speed-up and realisation are unknown.",
            "Profile the bundle with this release, which measures both.",
        )
    elif not result.gates and not result.tokens:
        text = "The model has no gates: there is nothing to skip, and the dense artifact is the same network."
        yield Advice(AdviceKind.NO_GATES, "info", None, text, "To skip work, train it with gates.")
    elif result.speedup is not None and result.speedup < 1:
        text = f"The gated artifact is slower than the dense one (speed-up {result.speedup:.2f})."
        yield Advice(AdviceKind.SLOWER, "warning", None, text, _remedy(result))
    elif result.realisation < LOW_REALISATION:
        yield Advice(
            AdviceKind.LITTLE_ARRIVES,
            "warning",
            None,
            f"Only {result.realisation:.0%} of the speed-up that the decisions allow arrives "
            f"({result.speedup:.2f} of {result.flop_ratio:.2f}).",
            _where_to_begin(result),
        )
    if result.forced:
        yield Advice(
            AdviceKind.FORCED,
            "info",
            None,
            "Decisions were forced to random ones: the times are real, the predictions mean nothing.",
            "Leave out --force to let the model decide.",
        )


def _where_to_begin(result: ProfileResult) -> str:
    """Name the gate whose layers take longest beyond what its decisions ask for."""
    lost = {
        gate.gate: gate.median_ms - gate.dense_median_ms * gate.executed_fraction
        for gate in result.gates
        if gate.median_ms is not None and gate.dense_median_ms is not None
    }
    if not lost:
        return _remedy(result)
    worst = max(lost, key=lambda name: lost[name])
    return f"Begin with gate {worst}, which loses most of it: {lost[worst]:.2f} ms a frame."


def _remedy(result: ProfileResult) -> str:
    if result.tokens and not result.gates:
        return "Drop more tokens, or ship the dense one."
    return backend_of(result.backend).remedy


def _spread(result: ProfileResult) -> Iterator[Advice]:
    spread = unreliable(result)
    if spread is not None:
        yield Advice(
            AdviceKind.UNRELIABLE,
            "warning",
            None,
            f"The measurement is not reliable: repeated steps of equal work spread by {spread:.0%}, so no gate is "
            "judged by its times here.",
            _calm(result),
        )
    elif result.gated.spread > WIDE_SPREAD:
        dense = f" while dense ones stay within {result.dense.spread:.0%}" if result.dense else ""
        yield Advice(
            AdviceKind.VARIED,
            "info",
            None,
            f"Gated steps spread by {result.gated.spread:.0%}{dense}: the frames ask for different work.",
            f"Plan with P99 ({result.gated.p99:.2f} ms), not with the median.",
        )


def _calm(result: ProfileResult) -> str:
    """Say how to get steadier times."""
    device = result.device
    acts = []
    if device.governor and device.governor != "performance":
        acts.append(f"set the CPU governor to 'performance' (it is '{device.governor}')")
    if device.threads > 1 and device.threads >= device.cores:
        acts.append(f"use fewer threads ({device.threads} run on {device.cores} cores)")
    acts.append("stop other programs, let it cool down, and give more --runs")
    text = "; ".join(acts)
    return f"{text[0].upper()}{text[1:]}."


_RULES: tuple[Rule, ...] = (_whole, _spread, *GATE_RULES, _outside, _deciding)
