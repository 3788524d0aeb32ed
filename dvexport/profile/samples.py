"""Samples of a measured quantity and what is told of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["MinMeanMax", "StepTimes", "ratio"]


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Return the quotient, None where either side is missing or the denominator is 0."""
    return None if numerator is None or not denominator else numerator / denominator


@dataclass
class StepTimes:
    """Latencies of the measured steps of one artifact, milliseconds, in the order measured."""

    samples_ms: list[float]

    def percentile(self, q: float) -> float:
        """Return the `q`-th percentile (0 to 100) in ms, linearly interpolated."""
        return float(np.percentile(self.samples_ms, q))

    @property
    def median(self) -> float:
        """Median, ms."""
        return self.percentile(50)

    @property
    def p90(self) -> float:
        """90th percentile, ms."""
        return self.percentile(90)

    @property
    def p99(self) -> float:
        """99th percentile, ms."""
        return self.percentile(99)

    @property
    def min(self) -> float:
        """Fastest step, ms."""
        return min(self.samples_ms)

    @property
    def max(self) -> float:
        """Slowest step, ms."""
        return max(self.samples_ms)

    @property
    def spread(self) -> float:
        """Interquartile range over the median: how far repeated steps differ."""
        return (self.percentile(75) - self.percentile(25)) / self.median


@dataclass
class MinMeanMax:
    """Least, mean and greatest over the frames of the clip."""

    min: float
    mean: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> MinMeanMax:
        """Sum up `values` (at least one)."""
        return cls(float(min(values)), float(np.mean(values)), float(max(values)))
