"""What a recorded run says of every node or kernel call, whatever the backend."""

from __future__ import annotations

from dataclasses import dataclass

from dvexport.targets.roles import node_role

__all__ = ["NodeTime", "NodeTimes"]


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
    """Medians over the steps: of every node in microseconds, of every gate's nodes together in ms."""

    nodes: list[NodeTime]
    gate_ms: dict[str, float]
