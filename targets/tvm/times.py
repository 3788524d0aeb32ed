"""The time of every kernel call of a native artifact, and of every gate, from the runtime's own clock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from dvexport.decisions import TOKENS
from dvexport.targets.times import NodeTime, NodeTimes, typical, warmed
from dvexport.targets.tvm.session import CallTime
from dvexport.targets.tvm.units.catalogue import KINDS
from dvexport.targets.tvm.units.kinds import Role

__all__ = ["call_times"]


def call_times(steps: Sequence[Sequence[CallTime]], passes: int) -> NodeTimes:
    """Return what a recording says of every call.

    Args:
        steps: the calls of every step, in order.
        passes: how often the same frames were run, the first time as a warm-up.
    """
    steps, passes = steps[warmed(len(steps), passes) :], max(passes - 1, 1)
    shown = sorted(steps, key=lambda calls: sum(call.seconds for call in calls))[len(steps) // 2]
    per_gate: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(steps))
    for index, calls in enumerate(steps):
        for call in calls:
            if call.gate:
                per_gate[call.gate][index] += call.seconds * 1e3
    medians = np.median([[call.seconds for call in calls] for calls in steps], axis=0) * 1e6
    starts = np.cumsum([0.0, *(call.seconds for call in shown)]) * 1e6
    nodes = [
        _node(call, float(median), float(start)) for call, median, start in zip(shown, medians, starts, strict=False)
    ]
    return NodeTimes(nodes, {gate: typical(times, passes) for gate, times in per_gate.items()})


def _node(call: CallTime, median_us: float, start_us: float) -> NodeTime:
    kind, _, value = call.label.partition(" ")
    kernel = f" ({call.kernel})" if call.kernel else ""
    role = KINDS[kind].role if kind in KINDS else Role.OTHER
    decides = call.gate == TOKENS.name or (bool(call.gate) and role is Role.DECIDE)
    return NodeTime(value + kernel, kind, call.gate or None, median_us, start_us, call.seconds * 1e6, decides, role)
