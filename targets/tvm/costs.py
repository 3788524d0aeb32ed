"""What a kernel is expected to cost, as a function of what a gate decides.

A cost model has ten coefficients, nanoseconds on one thread. Eight are over (1, a, b, c, ab, ac, bc, abc): output
channels, input channels and vectors of pixels (`plan.py`). Two are what is waited for weights, a min(b line, stream):
of few input channels each cache line comes alone, of many all come in a row. They are made of a few rates of the
machine: what a kernel does is known exactly (`DirectConv`, `WinogradConv`), how long a unit of it takes is measured
(`tune.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

if TYPE_CHECKING:
    from dvexport.targets.tvm.kernels.direct import DirectConv
    from dvexport.targets.tvm.kernels.winograd import WinogradConv
    from dvexport.targets.tvm.machine import Machine

__all__ = [
    "Cost",
    "Rates",
    "TileVectors",
    "direct_cost",
    "estimate",
    "evaluate",
    "fixed",
    "rates_of",
    "tile_vectors",
    "winograd_cost",
]

Cost = tuple[float, ...]

_TERMS = ("", "a", "b", "c", "ab", "ac", "bc", "abc")
"""What each of the first coefficients of a cost model is multiplied by; the last are `line` and `stream`."""

_CACHE_LINE = 16
"""Weights of a cache line."""

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]

_SHORT = 2
"""Pixels of a run up to which it is moved one by one."""


@dataclass(frozen=True)
class Rates:
    """Nanoseconds of a unit of work on one thread.

    Attributes:
        call: a call that finds nothing to do.
        row: begin an output channel.
        product: multiply-add of a vector in a register block, both factors at hand.
        point_product: the same of a 1 x 1 window.
        window_product: the same, the vector loaded from a plane, where it is seldom aligned.
        loaded: read a vector of a plane, for all output channels.
        packed: move a run of a window to scratch.
        packed_short: the same of a run of 1 or 2 pixels.
        finished: finish a vector of an output: its bias, its activation.
        written: write a run of an output.
        residual: read a run of what is added.
        weight: read a weight, all of them in a row.
        line: read a cache line of weights whose neighbours nobody wants.
        tile_row: begin an output channel of a Winograd convolution, per point.
        tile_product: multiply-add of a vector of tiles.
        input2, input4: transform a vector of tiles of F(2 x 2, 3 x 3) or F(4 x 4, 3 x 3), per point, on the way in.
        output2, output4: the same on the way out.
        source: where they are from.
    """

    call: Rate
    row: Rate
    product: Rate
    point_product: Rate
    window_product: Rate
    loaded: Rate
    packed: Rate
    packed_short: Rate
    finished: Rate
    written: Rate
    residual: Rate
    weight: Rate
    line: Rate
    tile_row: Rate
    tile_product: Rate
    input2: Rate
    input4: Rate
    output2: Rate
    output4: Rate
    source: Annotated[str, Field(min_length=1)]
    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": False}

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the rates, in order."""
        return [field.name for field in fields(cls) if field.name != "source"]

    def values(self) -> dict[str, float]:
        """Return the rates by name."""
        return {name: getattr(self, name) for name in self.names()}


_MEASURED = {
    16: Rates(
        call=2988.0,
        row=23.41,
        product=0.1257,
        point_product=0.1563,
        window_product=0.1496,
        loaded=0.3297,
        packed=0.8568,
        packed_short=0.2876,
        finished=2.639,
        written=0.0,
        residual=0.7792,
        weight=0.1837,
        line=15.33,
        tile_row=1.251,
        tile_product=0.1051,
        input2=2.435,
        input4=3.024,
        output2=0.8195,
        output4=2.626,
        source="measured on x86-64 with 16 lanes",
    ),
    8: Rates(
        call=1998.0,
        row=41.71,
        product=0.1353,
        point_product=0.146,
        window_product=0.1397,
        loaded=0.1282,
        packed=0.8538,
        packed_short=0.4376,
        finished=1.437,
        written=0.0,
        residual=0.6502,
        weight=0.1936,
        line=9.74,
        tile_row=0.7165,
        tile_product=0.114,
        input2=1.903,
        input4=1.945,
        output2=0.6417,
        output4=1.524,
        source="measured on x86-64 with 8 lanes",
    ),
    4: Rates(
        call=1832.0,
        row=46.37,
        product=0.1289,
        point_product=0.1221,
        window_product=0.1363,
        loaded=0.04685,
        packed=0.7369,
        packed_short=0.4696,
        finished=0.935,
        written=0.0,
        residual=0.5319,
        weight=0.188,
        line=8.992,
        tile_row=1.241,
        tile_product=0.1386,
        input2=1.171,
        input4=1.063,
        output2=0.4506,
        output4=0.723,
        source="measured on x86-64 with 4 lanes",
    ),
}
"""By lanes: AVX-512, AVX2 and 128-bit instructions of an Intel Xeon."""


_MEMORY = ("call", "row", "weight", "line", "tile_row")
"""Rates that are mostly waiting for memory, whose latency differs less between machines than their arithmetic."""


def estimate(lanes: int, gflops: float) -> Rates:
    """Return rates for a processor that nobody measured: those of x86-64 with so many lanes, its arithmetic scaled.

    Args:
        lanes: float32 values of a vector.
        gflops: of one core, a multiply-accumulate counts two.
    """
    known = _of_lanes(lanes)
    speed = 2 * lanes / gflops / known.product
    values = {name: value * (1 if name in _MEMORY else speed) for name, value in known.values().items()}
    return Rates(**values, source=f"estimated: x86-64 with {lanes} lanes, scaled to {gflops:g} GFLOP/s a core")


def rates_of(machine: Machine) -> Rates:
    """Return the rates of a machine; where nobody says, those of x86-64 with as many lanes."""
    return machine.rates or _of_lanes(machine.lanes)


def _of_lanes(lanes: int) -> Rates:
    return _MEASURED.get(lanes, _MEASURED[min(_MEASURED)])


def direct_cost(spec: DirectConv, taps: int, inputs: int, machine: Machine) -> Cost:
    """Return the cost model of a direct convolution.

    Args:
        spec: the kernel.
        taps: pixels of its windows.
        inputs: input channels of the layer, listed or not.
        machine: what it runs on.
    """
    rates, pieces = rates_of(machine), machine.lanes // spec.run
    if spec.packed:
        product = rates.point_product if spec.taps == 1 else rates.product
        read = pieces * (rates.packed_short if spec.run <= _SHORT else rates.packed)
    else:
        product, read = rates.window_product, rates.loaded
    write = rates.finished + pieces * (rates.written + (rates.residual if spec.residual else 0.0))
    line = rates.line * (1 + (taps - 1) / _CACHE_LINE)  # a window's weights begin anywhere in one
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

    Vectors are whole: of any number of cells, each as likely as another, the line is taken that is closest.

    Args:
        tiles: of every cell of the grid; of the image where there is no grid.
        vectors: of the direct kernel, for all cells.
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
    rates, points = rates_of(machine), spec.points
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
