"""Numbers of a processor, as data: how long units of work take, and what its kernels are generated with."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

from pydantic import Field

from dvexport.targets.tvm.machine.dtype import F32, DType

__all__ = ["MOST_ROWS", "Parameters", "Rates", "TypedRates"]

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]


@dataclass(frozen=True)
class Rates:
    """Nanoseconds of a unit of work on one thread, in kernels of one element type.

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


@dataclass(frozen=True)
class TypedRates:
    """Rates by the element type that kernels compute in: the tables of `[runtimes.tvm.rates]`. None: not measured."""

    f32: Rates | None = None
    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": False}

    def of(self, dtype: DType) -> Rates | None:
        """Return the rates of an element type."""
        return getattr(self, dtype.name, None)

    @staticmethod
    def read(values: Any) -> Any:
        """Return the tables of a target file, of one too that has those of `f32` alone, as `tune` once wrote them."""
        flat = isinstance(values, dict) and not values.keys().isdisjoint(Rates.names())
        return {F32.name: values} if flat else values


MOST_ROWS = 16
"""The most rows a register block can have."""


Rows = Annotated[int, Field(ge=1, le=MOST_ROWS)]


Vectors = Annotated[int, Field(ge=1, le=8)]


@dataclass(frozen=True)
class Parameters:
    """What convolution kernels are generated with.

    Attributes:
        planes: register block of 3 x 3 windows that are read from the planes, and of columns that are packed.
        packed: the same of all other packed windows.
        tall: rows of these by `TALL` vectors, where a few tiles or a small plane have no more: more rows are more
            weights on their way at a time. 0: those of `packed`.
        small_plane: pixels of a plane up to which 3 x 3 windows are packed: each weight is loaded once then.
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
