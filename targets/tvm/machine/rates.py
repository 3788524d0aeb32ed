"""Numbers of a processor, as data: how long units of work take, and what its kernels are generated with."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

from pydantic import Field

__all__ = ["MOST_ROWS", "Parameters", "Rates", "estimate"]

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]


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


def _of_lanes(lanes: int) -> Rates:
    return _MEASURED.get(lanes, _MEASURED[min(_MEASURED)])


MOST_ROWS = 16
"""Of any register block."""


Rows = Annotated[int, Field(ge=1, le=MOST_ROWS)]


Vectors = Annotated[int, Field(ge=1, le=8)]


@dataclass(frozen=True)
class Parameters:
    """Of convolution kernels.

    Attributes:
        planes: register block of 3 x 3 windows that are read from the planes, and of columns that are packed.
        packed: the same of all other packed windows.
        tall: rows of these by `TALL` vectors, where a few tiles or a small plane have no more: more rows are more
            weights on their way at a time. 0: those of `packed`.
        small_plane: pixels of a plane up to which 3 x 3 windows are packed: weights come by once then.
        winograd: rows of the register block, for a block of one vector of tiles, of two, and so on. Its length is the
            most vectors of a block.
        source: where they are from.
    """

    planes: tuple[Rows, Vectors]
    packed: tuple[Rows, Vectors]
    tall: Annotated[int, Field(ge=0, le=MOST_ROWS)]
    small_plane: Annotated[int, Field(ge=0)]
    winograd: Annotated[tuple[Rows, ...], Field(min_length=1, max_length=8)]
    source: Annotated[str, Field(min_length=1)]
    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": False}

    def values(self) -> dict[str, Any]:
        """Return all but the source, by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "source"}
