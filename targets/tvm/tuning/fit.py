"""Fit a machine's rates to what its kernels took, and say how well they predict.

The cost models are linear in the rates, but that weights come by cache lines or in a row, whichever is faster. Once it
is decided which, each sample is one equation: the work of each kind times its rate is the time. Solved for the
least relative error, so that calls of a microsecond count as much as those of a millisecond, and decided anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dvexport.targets.tvm.calls.costs import evaluate, rates_of
from dvexport.targets.tvm.machine.machine import Machine
from dvexport.targets.tvm.machine.rates import Rates, TypedRates
from dvexport.targets.tvm.tuning.measure import Sample

__all__ = ["Fit", "fit", "non_negative_least_squares"]

_SWEEPS = 2000
_ENOUGH = 1e-9
_ROUNDS = 20
_NEVER = 1e12
"""Nanoseconds that nobody takes."""
_OUTLIER = 0.25
"""Relative error above which a sample counts less: a measurement that was disturbed, or a kernel the model misses."""


@dataclass(frozen=True)
class Fit:
    """Rates and how good they are.

    Attributes:
        rates: nanoseconds.
        median, ninth: relative error that half of the samples stay below, and nine of ten.
        choices: works that two kernels could do.
        right: how many of these the faster kernel would do.
        lost: time that the wrong ones cost, as a part of all of them at their best.
    """

    rates: Rates
    median: float
    ninth: float
    choices: int
    right: int
    lost: float


def fit(samples: Sequence[Sample], machine: Machine, source: str) -> Fit:
    """Return the rates that explain `samples` best.

    Args:
        samples: measured.
        machine: what ran them.
        source: what the rates are to say of where they are from.
    """
    times = np.array([sample.seconds * 1e9 for sample in samples])
    rates = replace(_robust(_work(samples, machine), times, rates_of(machine)), source=source)
    expected = _expected(samples, replace(machine, rates=TypedRates(f32=rates)))
    errors = np.abs(expected / times - 1)
    return Fit(rates, float(np.median(errors)), float(np.quantile(errors, 0.9)), *_choices(samples, expected, times))


def non_negative_least_squares(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return x >= 0 with the least |matrix x - wanted|, by coordinate descent.

    Args:
        matrix: `[equations, unknowns]`.
        wanted: `[equations]`.
    """
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    square, right = (matrix / scale).T @ (matrix / scale), (matrix / scale).T @ wanted
    x = np.zeros(len(right))
    for _ in range(_SWEEPS):
        before = x.copy()
        for k in range(len(x)):
            if square[k, k] > 0:
                x[k] = max(0.0, x[k] + (right[k] - square[k] @ x) / square[k, k])
        if np.abs(x - before).max() <= _ENOUGH * np.abs(x).max():
            break
    return x / scale


def _robust(work: dict[str, np.ndarray], times: np.ndarray, start: Rates) -> Rates:
    """Solve for rates that explain the times, equations that are far off weighted down (Huber's weights)."""
    weights, values = np.ones(len(times)), start.values()
    for _ in range(_ROUNDS):
        by_line = values["line"] * work["line"] < values["weight"] * work["weight"]
        taken = {**work, "line": np.where(by_line, work["line"], 0.0), "weight": np.where(by_line, 0.0, work["weight"])}
        matrix = np.stack([taken[name] for name in Rates.names()], axis=1) / times[:, None]
        solution = non_negative_least_squares(matrix * weights[:, None], weights)
        errors = np.abs(matrix @ solution - 1)
        weights = np.sqrt(np.minimum(1.0, _OUTLIER / np.maximum(errors, _OUTLIER)))
        values = dict(zip(Rates.names(), solution.tolist(), strict=True))
    return Rates(**values, source="")


def _work(samples: Sequence[Sample], machine: Machine) -> dict[str, np.ndarray]:
    """Return how much of each kind of work every sample is: its cost where that kind takes 1 ns, the others none.

    All weights by cache lines and all in a row are two kinds.
    """
    none = dict.fromkeys(Rates.names(), 0.0)
    found = {}
    for name in none:
        other = {"line": "weight", "weight": "line"}.get(name)
        kind = {**none, name: 1.0} if other is None else {**none, name: 1.0, other: _NEVER}
        found[name] = _expected(samples, replace(machine, rates=TypedRates(f32=Rates(**kind, source=name))))
    return found


def _expected(samples: Sequence[Sample], machine: Machine) -> np.ndarray:
    return np.array([evaluate(sample.cost(machine), *sample.counts) for sample in samples])


def _choices(samples: Sequence[Sample], expected: np.ndarray, times: np.ndarray) -> tuple[int, int, float]:
    """Return how many works had a choice, how many choices are right, and what the others cost."""
    rivals = defaultdict(list)
    for index, sample in enumerate(samples):
        rivals[sample.work].append(index)
    several = [indices for indices in rivals.values() if len(indices) > 1]
    best = np.array([min(times[indices]) for indices in several])
    picked = np.array([times[min(indices, key=lambda i: expected[i])] for indices in several])
    lost = float((picked - best).sum() / best.sum()) if several else 0.0
    return len(several), int((picked == best).sum()), lost
