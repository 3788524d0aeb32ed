"""What the convolution kernels of a target are generated with, where processors of one instruction set differ.

A register block is output channels by vectors of pixels (or of Winograd's tiles) whose sums stay in registers. Which
one is fastest depends on how many numbers a processor loads and multiplies in a cycle, and on its memory; `dvexport
tune` measures it (`tune_parameters.py`), and a target's file keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

if TYPE_CHECKING:
    from dvexport.targets.tvm.machine import Machine

__all__ = ["MOST_ROWS", "TALL", "Parameters", "fits", "parameters_of"]

TALL = 2
"""Vectors of pixels up to which a block has `Parameters.tall` rows."""

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


_BY_LANES = {
    # Addresses of more than six rows leave x86-64 none for the pixels of a third vector. Winograd's weights are read
    # once for every block: four vectors instead of two made ResNet-18 3 % faster, with gates up to 7 %.
    16: Parameters((8, 3), (6, 4), 8, 128, (8, 8, 8, 6), "measured on x86-64 with AVX-512"),
    8: Parameters((6, 2), (4, 3), 0, 128, (8, 6, 4), "measured on x86-64 with AVX2"),
}
_NEON = {
    True: Parameters((5, 4), (5, 4), 0, 128, (12, 8, 6, 6), "as many sums as the 32 registers of AArch64 hold"),
    False: Parameters((3, 3), (3, 3), 0, 128, (6, 4, 3), "as many sums as the 16 registers of ARMv7 hold"),
}


def parameters_of(machine: Machine) -> Parameters:
    """Return the parameters of a machine; where nobody says, those of its instruction set."""
    return machine.parameters or _BY_LANES.get(machine.lanes) or _NEON[machine.is_aarch64]


def fits(rows: int, vectors: int, machine: Machine) -> bool:
    """Tell whether a register block leaves registers for its pixels and its weights.

    AArch64 multiplies by one lane of a register and loads four weights of a row at once; elsewhere a weight is repeated
    in all lanes of one register, which AVX-512 does within the multiplication.
    """
    weights = rows if machine.is_aarch64 else 0 if machine.lanes == 16 else 1
    return rows * vectors + vectors + weights <= machine.registers
