"""What a recorded run says of every node or kernel call, whatever the backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dvexport.targets.roles import node_role

__all__ = ["NodeTime", "NodeTimes", "typical", "warmed"]


@dataclass
class NodeTime:
    """One node of the gated artifact.

    Args:
        node, op: name and operator type.
        gate: the gate it belongs to; None outside the gates.
        median_us: over all steps.
        start_us: from the begin of the one step that the timeline shows.
        duration_us: in that step; None: the median stands in.
        decides: it is part of what takes the gate's decision.
        told: what it is there for, from a backend whose `op` is no ONNX operator; None: `roles.node_role` tells.
    """

    node: str
    op: str
    gate: str | None
    median_us: float
    start_us: float = 0.0
    duration_us: float | None = None
    decides: bool = False
    told: str | None = None

    @property
    def role(self) -> str:
        """`compute`, `decide`, `move`, `control` or `other` (see `roles.node_role`)."""
        role = self.told or node_role(self.op)
        return "decide" if self.decides and role != "control" else role

    @property
    def timeline_us(self) -> float:
        """Duration to draw in the timeline, microseconds."""
        return self.median_us if self.duration_us is None else self.duration_us


@dataclass(frozen=True)
class NodeTimes:
    """Times of every node, medians over the steps in microseconds; and of each gate, `typical` ones in ms."""

    nodes: list[NodeTime]
    gate_ms: dict[str, float]


def warmed(steps: int, passes: int) -> int:
    """Return how many steps of a recording of `passes` passes over the same frames are the first pass, a warm-up."""
    return steps // passes if passes > 1 else 0


def typical(times: Sequence[float], passes: int) -> float:
    """Return the mean over frames of the median over passes: no single outlier moves it.

    So it stands beside the mean of the multiply-accumulates that the same frames ask for.

    Args:
        times: of the steps of `passes` passes over the same frames, in order.
        passes: how many of them.
    """
    return float(np.median(np.reshape(times, (passes, -1)), axis=0).mean())
