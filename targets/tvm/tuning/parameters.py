"""Choose what the convolution kernels of this machine are generated with, by measuring them.

Parameters are chosen one after the other. Kernels of every value that may be good do the same work, all in one plan
(`measure.py`). The value whose kernels take the least time, by the geometric mean over all work, stays. A new value has
to be better by more than two measurements of one kernel differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dvexport.targets.tvm.kernels.conv.direct import DirectConv
from dvexport.targets.tvm.machine.machine import Machine
from dvexport.targets.tvm.machine.parameters import TALL, fits, parameters_of
from dvexport.targets.tvm.machine.rates import MOST_ROWS, Parameters
from dvexport.targets.tvm.tuning.measure import Sample, Trial, time_trials, trials_of
from dvexport.targets.tvm.tuning.workloads import Work, Workload, workloads

__all__ = ["candidates", "choose_parameters"]

Progress = Callable[[str], None]

_BETTER = 0.02
"""Part of the time that another value has to save."""

_FULL = 0.75
"""A register block may leave so much less sums than the largest one: with fewer, loading takes longer than adding."""

_SHARES = ((1.0, 1.0, 1.0), (0.5, 0.5, 1.0), (1.0, 1.0, 0.5))
"""Shares of output channels, input channels and cells."""


def choose_parameters(
    machine: Machine, seconds: float, source: str, tell: Progress, given: Sequence[Workload] | None = None
) -> Parameters:
    """Return the parameters that this machine is fastest with.

    Args:
        machine: this one; it begins with the parameters that it has.
        seconds: how long to repeat, all parameters together.
        source: what they are to say of where they are from.
        tell: called with the name of each step as it begins.
        given: what to measure with; by default `workloads.toml`'s.

    Raises:
        DeviceError: a package of the extra `tvm` is missing, or this machine can't run the code.
    """
    best, works = parameters_of(machine), _works(workloads("parameters") if given is None else given)
    for name in best.values():
        values = candidates(name, best, machine)
        times = _times(name, values, best, works, machine, seconds / len(best.values()), tell)
        if not times:
            continue
        value = min(times, key=lambda each: times[each])
        if times[value] < (1 - _BETTER) * times[getattr(best, name)]:
            best = replace(best, **{name: value})
        tell(f"{name}: {', '.join(f'{each} {times[each]:.3f}' for each in times)}")
    return replace(best, source=source)


def candidates(name: str, now: Parameters, machine: Machine) -> list[Any]:
    """Return the values of a parameter worth measuring, the present one first."""
    found: dict[str, Callable[[], Iterator[Any]]] = {
        "planes": lambda: _blocks(machine),
        "packed": lambda: _blocks(machine),
        "tall": lambda: (
            rows for rows in (0, 8, 10) if (not rows or rows > now.packed[0]) and fits(rows, TALL, machine)
        ),
        "small_plane": lambda: iter((0, 128, 256, 1024)),
        "winograd": lambda: _winograd_blocks(machine),
    }
    present = getattr(now, name)
    return [present, *(value for value in found[name]() if value != present)]


def _blocks(machine: Machine) -> Iterator[tuple[int, int]]:
    """Yield the largest register blocks of some vectors, and others that are nearly as large, from 2 to 5 vectors."""
    largest = {vectors: max(rows for rows in range(1, 9) if fits(rows, vectors, machine)) for vectors in range(2, 6)}
    most = max(rows * vectors for vectors, rows in largest.items())
    for vectors, rows in largest.items():
        yield from ((each, vectors) for each in (rows, rows - 1) if each * vectors >= _FULL * most)


def _winograd_blocks(machine: Machine) -> Iterator[tuple[int, ...]]:
    """Yield the largest blocks of one vector, of two, and so on, to several last ones; rows are even, for threads."""
    rows = [max(each for each in range(1, MOST_ROWS + 1) if fits(each, vectors, machine)) for vectors in range(1, 6)]
    for most in (8, 12):
        for last in range(2, 6):
            if rows[last - 1] > 2:
                yield tuple(min(most, each - each % 2) for each in rows[:last])


def _works(given: Sequence[Workload]) -> list[Work]:
    rng = np.random.default_rng(0)

    def some(count: int, share: float) -> np.ndarray:
        return np.sort(rng.permutation(count)[: max(1, round(count * share))])

    works = []
    for workload in given:
        for rows, columns, of_cells in _SHARES:
            if of_cells < 1 and workload.cells is None:
                continue
            cells = np.zeros((workload.cells or 1) ** 2, bool)
            cells[some(cells.size, of_cells)] = True
            works.append(Work(workload, some(workload.cout, rows), some(workload.cin, columns), cells))
    return works


def _times(
    name: str, values: Sequence[Any], now: Parameters, works: Sequence[Work], machine: Machine, seconds: float,
    tell: Progress,
) -> dict[Any, float]:  # fmt: skip
    """Return the time of each value's kernels, by that of the present one's: where they are not the same kernels."""
    of: list[tuple[int, Any]] = []
    trials: list[Trial] = []
    for index, work in enumerate(works):
        made = {}
        for value in values:
            tuned = replace(machine, parameters=replace(now, **{name: value}))
            trial = _trial(index, work, tuned, direct=name != "winograd")
            if trial is not None:
                made[value] = trial
        if len({trial.sample.spec for trial in made.values()}) > 1:
            of += [(index, value) for value in made]
            trials += made.values()
    if not trials:
        return {}
    tell(f"{name}: {len(values)} values")
    return _means(values, dict(zip(of, time_trials(trials, machine, seconds, tell), strict=True)))


def _trial(index: int, work: Work, machine: Machine, *, direct: bool) -> Trial | None:
    return next(
        (each for each in trials_of(index, work, machine) if isinstance(each.sample.spec, DirectConv) == direct), None
    )


def _means(values: Sequence[Any], samples: dict[tuple[int, Any], Sample]) -> dict[Any, float]:
    ratios = defaultdict(list)
    for (index, value), sample in samples.items():
        ratios[value].append(np.log(sample.seconds / samples[index, values[0]].seconds))
    return {value: float(np.exp(np.mean(ratios[value]))) for value in values}
