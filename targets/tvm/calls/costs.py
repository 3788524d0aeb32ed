"""What a kernel is expected to cost, as a function of what a gate decides.

A cost model has ten coefficients, nanoseconds on one thread. Eight are over (1, a, b, c, ab, ac, bc, abc): output
channels, input channels and vectors of pixels (`plan_file.py`). Two are the wait for weights, a min(b line,
stream): with few input channels each cache line is fetched alone, with many they stream. The coefficients are made of a
few rates of the machine. What a kernel does is known exactly (`DirectConv`, `WinogradConv`); how long a unit of that
work takes is measured (`tuning/measure.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dvexport.targets.tvm.kernels.conv.direct import DirectConv
from dvexport.targets.tvm.machine import by_lanes
from dvexport.targets.tvm.machine.dtype import F32, DType
from dvexport.targets.tvm.machine.rates import Rates

if TYPE_CHECKING:
    from dvexport.targets.tvm.kernels.conv.winograd import WinogradConv
    from dvexport.targets.tvm.machine.machine import Machine

__all__ = [
    "Cost",
    "TileVectors",
    "conv_cost",
    "direct_cost",
    "evaluate",
    "fixed",
    "rates_of",
    "tile_vectors",
    "winograd_cost",
]

Cost = tuple[float, ...]

_TERMS = ("", "a", "b", "c", "ab", "ac", "bc", "abc")
"""What each of the first coefficients of a cost model is multiplied by; the last are `line` and `stream`."""

_SHORT = 2
"""Pixels of a run up to which it is moved one by one."""


def rates_of(machine: Machine, dtype: DType = F32) -> Rates:
    """Return the rates of a machine in an element type; where nobody says, those of x86-64 with as many lanes."""
    known = machine.rates.of(dtype) if machine.rates else None
    return known or by_lanes.rates(machine.lanes, dtype)


def direct_cost(spec: DirectConv, taps: int, inputs: int, machine: Machine) -> Cost:
    """Return the cost model of a direct convolution.

    Args:
        spec: the kernel.
        taps: pixels of its windows.
        inputs: input channels of the layer, listed or not.
        machine: what it runs on.
    """
    rates, pieces = rates_of(machine, spec.dtype), machine.lanes // spec.run
    if spec.packed:
        product = rates.point_product if spec.taps == 1 else rates.product
        read = pieces * (rates.packed_short if spec.run <= _SHORT else rates.packed)
    else:
        product, read = rates.window_product, rates.loaded
    write = rates.finished + pieces * (rates.written + (rates.residual if spec.residual else 0.0))
    line = rates.line * (1 + (taps - 1) / spec.dtype.line)  # a window's weights begin anywhere in one
    stream = rates.weight * taps * inputs
    terms = (rates.call, rates.row, 0.0, 0.0, 0.0, write, read * spec.moved(taps), product * taps)
    return (*terms, line, stream)


@dataclass(frozen=True)
class TileVectors:
    """How many vectors Winograd's tiles fill: `per` for each vector of the direct kernel, and `spare` more."""

    per: float = 1.0
    spare: float = 0.0


def tile_vectors(tiles: Sequence[int], vectors: int, lanes: int) -> TileVectors:
    """Return how the vectors of Winograd's tiles follow from those of the direct kernel.

    Vectors are whole, so the line is a fit over all numbers of active cells, each as likely as another.

    Args:
        tiles: how many each cell of the grid has, or the image where there is no grid.
        vectors: how many the direct kernel has for all cells.
        lanes: tiles of a vector.
    """
    total = sum(tiles)
    if len(tiles) == 1:
        return TileVectors(-(-total // lanes) / vectors)
    step = math.gcd(*tiles)
    counts = range(step, total + 1, step)
    per, spare = _line([(count * vectors / total, -(-count // lanes)) for count in counts])
    return TileVectors(per, spare)


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return slope and intercept of the line with the least relative error in y."""
    terms = [(x / y, 1 / y) for x, y in points]
    xx, x1, one = (sum(t[i] * t[j] for t in terms) for i, j in ((0, 0), (0, 1), (1, 1)))
    x, y = (sum(t[i] for t in terms) for i in (0, 1))
    divisor = xx * one - x1 * x1
    return ((x * one - y * x1) / divisor, (xx * y - x1 * x) / divisor) if divisor else (0.0, 1.0)


def winograd_cost(spec: WinogradConv, tiles: TileVectors, inputs: int, machine: Machine) -> Cost:
    """Return the cost model of a Winograd convolution, over the vectors of the direct kernel as all ways are.

    Args:
        spec: the kernel.
        tiles: its vectors.
        inputs: input channels of the layer, listed or not.
        machine: what it runs on.
    """
    rates, points = rates_of(machine, spec.dtype), spec.points
    read, write = (rates.input2, rates.output2) if spec.m == 2 else (rates.input4, rates.output4)
    row, product, line, weight, read, write = (
        rate * points for rate in (rates.tile_row, rates.tile_product, rates.line, rates.weight, read, write)
    )
    if spec.residual:
        write += rates.residual * spec.m * machine.lanes / 4
    return (
        rates.call,
        write * tiles.spare + row,
        read * tiles.spare,
        0.0,
        product * tiles.spare,
        write * tiles.per,
        read * tiles.per,
        product * tiles.per,
        line,
        weight * inputs,
    )


def conv_cost(spec: DirectConv | WinogradConv, taps: int, tiles: TileVectors, inputs: int, machine: Machine) -> Cost:
    """Return the cost model of a convolution, whichever its kernel; see `direct_cost` and `winograd_cost`."""
    if isinstance(spec, DirectConv):
        return direct_cost(spec, taps, inputs, machine)
    return winograd_cost(spec, tiles, inputs, machine)


def evaluate(cost: Sequence[float], a: float, b: float, c: float) -> float:
    """Return the nanoseconds that a cost model expects."""
    *factors, line, stream = cost
    terms = (1.0, a, b, c, a * b, a * c, b * c, a * b * c)
    return sum(factor * term for factor, term in zip(factors, terms, strict=True)) + a * min(b * line, stream)


def fixed(cost: Cost, a: float | None, b: float | None, c: float | None) -> Cost:
    """Return the cost model with those counts fixed that are given: the runtime counts them as 1."""
    folded = [0.0] * len(_TERMS)
    *factors, line, stream = cost
    for factor, term in zip(factors, _TERMS, strict=True):
        left = ""
        for name, count in (("a", a), ("b", b), ("c", c)):
            if name in term and count is not None:
                factor *= count
            elif name in term:
                left += name
        folded[_TERMS.index(left)] += factor
    rows = 1 if a is None else a
    return (*folded, line * rows * (1 if b is None else b), stream * rows)
