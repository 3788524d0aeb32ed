"""Measure two artifacts of one model against each other on one clip.

They take turns frame by frame, and take turns at going first, so that whatever changes the clock of
the machine hits both alike. Warm-up is by time: clocks and caches settle by it, not by a count of steps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dvexport.decisions import KINDS, Key
from dvexport.run.feeds import Given, at, count
from dvexport.run.session import Decisions, Session, Step

__all__ = ["Measured", "interleaved", "random_decisions", "warm_up"]


@dataclass
class Measured:
    """What one artifact did.

    Attributes:
        samples_ms: times of all steps in the order measured; a step of clip mode is the whole clip.
        frame_ms: `[runs, T]`, the time of each frame (in clip mode its share).
        steps: the results of the first run.
    """

    samples_ms: list[float]
    frame_ms: np.ndarray
    steps: list[Step]


class _Player:
    """Plays a clip over and over, one step at a time."""

    def __init__(self, session: Session, frames: Given, forced: Sequence[Decisions] | None) -> None:
        self.session, self.frames, self.forced = session, frames, forced
        self.length = count(frames) if session.mode == "stream" else 1

    def play(self, index: int) -> list[Step]:
        """Run step `index` of the clip; the first one starts anew."""
        if self.session.mode == "clip":
            return self.session.run_clip(self.frames, self.forced)
        if index == 0:
            self.session.reset()
        forced = self.forced[index] if self.forced else None
        return [self.session.step(at(self.frames, slice(index, index + 1)), forced)]


def warm_up(gated: Session, dense: Session, frames: Given, forced: Sequence[Decisions] | None, seconds: float) -> int:
    """Run both in turn for `seconds`, at least one step each; return the steps each ran."""
    players = [_Player(gated, frames, forced), _Player(dense, frames, None)]
    end, steps = time.perf_counter() + seconds, 0
    while steps == 0 or time.perf_counter() < end:
        for player in players:
            player.play(steps % player.length)
        steps += 1
    return steps


def interleaved(
    gated: Session, dense: Session, frames: Given, forced: Sequence[Decisions] | None, runs: int
) -> tuple[Measured, Measured]:
    """Measure `runs` passes over a clip, step by step in turn.

    Args:
        frames: float32 `[T, 3, H, W]`, normalised; or every input by name.
        forced: the decisions of every frame, where `gated` is a forced variant.
    """
    players = [_Player(gated, frames, forced), _Player(dense, frames, None)]
    steps: list[list[list[Step]]] = [[], []]
    for run in range(runs):
        for played in steps:
            played.append([])
        for index in range(players[0].length):
            first = (run + index) % 2
            for side in (first, 1 - first):
                steps[side][-1] += players[side].play(index)
    return _measured(steps[0], gated.mode), _measured(steps[1], gated.mode)


def _measured(runs: list[list[Step]], mode: str) -> Measured:
    frame_ms = np.array([[step.seconds * 1e3 for step in run] for run in runs])
    samples = frame_ms.reshape(-1) if mode == "stream" else frame_ms.sum(axis=1)
    return Measured(samples.tolist(), frame_ms, runs[0])


def random_decisions(
    shapes: Mapping[Key, tuple[int, ...]],
    rates: Mapping[str, float],
    frames: int,
    seed: int = 0,
    tokens: Mapping[str, int] | None = None,
) -> list[Decisions]:
    """Return decisions for every frame, drawn anew for each gate and frame.

    Args:
        shapes: the shapes of one frame's decisions.
        rates: by what is decided over (`decisions.OVER`), 0 to 1; 1 where left out. Exactly
            round(rate * n) of a gate's n channels are computed and the others skipped; likewise for tiles. As many
            tokens are drawn as the gate keeps.
        seed: the same decisions for the same seed.
        tokens: by gate, how many tokens it chooses from.
    """
    rng, among = np.random.default_rng(seed), tokens or {}
    return [
        {
            (gate, kind): KINDS[kind].draw(rng, shape, rates.get(KINDS[kind].over, 1.0), among.get(gate, 0))
            for (gate, kind), shape in shapes.items()
        }
        for _ in range(frames)
    ]
