"""Interleaved timing: every side runs once a round, so that a drift of the machine meets all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["Timing", "interleave"]


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
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            run()
            start = time.perf_counter()
            run()
            samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: Timing(np.array(values)) for name, values in samples.items()}
