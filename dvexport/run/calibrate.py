"""What a clip's decisions say of each gate: the rates and statistics that lowerings are chosen by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dvexport.decisions import ACTION, TILES, Action
from dvexport.passes.group_channels import ChannelStatistics, group_rate
from dvexport.passes.lowerings import Shares
from dvexport.run.session import Step

__all__ = ["gate_rates", "gate_statistics"]


def gate_rates(steps: Sequence[Step]) -> dict[str, Shares]:
    """Return the mean rates of every gate over the frames of one clip.

    A channel counts as computed on a frame that computes it, and on one whose next frame reuses it
    (D-STEP Eq. 2).
    """
    rates = {}
    for gate in dict.fromkeys(gate for step in steps for gate, _ in step.decisions):
        tiles, action = _stacked(steps, gate, TILES.name), _stacked(steps, gate, ACTION.name)
        compute = active = groups = 1.0
        if action is not None:
            reused_next = np.zeros(action.shape, bool)
            reused_next[:-1] = action[1:] == Action.REUSE
            compute = float(np.mean((action == Action.COMPUTE) | reused_next))
            active = float(np.mean(action != Action.SKIP))
            groups = group_rate(action)
        owed = 0.0
        if tiles is not None and action is not None:
            reuses = (action[1:] == Action.REUSE).any(axis=1)
            owed = float(np.sum((tiles[1:] & ~tiles[:-1])[reuses]) / tiles.size)
        rates[gate] = Shares(1.0 if tiles is None else float(tiles.mean()), compute, active, groups, owed)
    return rates


def gate_statistics(steps: Sequence[Step]) -> dict[str, ChannelStatistics]:
    """Return the actions of every gate over the frames of one clip."""
    gates = dict.fromkeys(gate for step in steps for gate, kind in step.decisions if kind == ACTION.name)
    return {gate: ChannelStatistics(_stacked(steps, gate, ACTION.name)) for gate in gates}  # type: ignore[arg-type]


def _stacked(steps: Sequence[Step], gate: str, kind: str) -> np.ndarray | None:
    if (gate, kind) not in steps[0].decisions:
        return None
    return np.stack([step.decisions[gate, kind] for step in steps])
