"""Interleaved timing: every side runs once a round, so that a drift of the machine meets all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["Timing", "interleave", "take_turns"]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one side, one value a round."""

    samples_ms: np.ndarray

    @property
    def median(self) -> float:
        """Median in ms."""
        return float(np.median(self.samples_ms))

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, high = np.percentile(self.samples_ms, (25, 75))
        return float((high - low) / self.median)

    def speedup_over(self, other: Timing) -> float:
        """Median over rounds of the other side's time over this one's."""
        return float(np.median(other.samples_ms / self.samples_ms))


def interleave(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time every side in turn, `rounds` times; each call is preceded by one that is not counted.

    The uncounted call puts the side's weights back into the caches that the side before it used.
    """
    return take_turns({name: lambda run=run: _second_call(run) for name, run in sides.items()}, rounds)  # type: ignore[misc]


def take_turns(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    """Let every side measure itself in turn, `rounds` times; each returns its seconds."""
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure in sides.items():
            samples[name].append(1e3 * measure())
    return {name: Timing(np.array(values)) for name, values in samples.items()}


def _second_call(run: Callable[[], object]) -> float:
    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
