"""What the convolution kernels of a target are generated with, where processors of one instruction set differ.

A register block is output channels by vectors of pixels (or of Winograd's tiles) whose sums stay in registers. Which
one is fastest depends on how many numbers a processor loads and multiplies in a cycle, and on its memory; `dvexport
tune` measures it (`tune_parameters.py`), and a target's file keeps it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dvexport.targets.tvm.machine.machine import Machine

from dvexport.targets.tvm.machine.rates import Parameters

__all__ = ["TALL", "fits", "parameters_of"]

TALL = 2
"""Vectors of pixels up to which a block has `Parameters.tall` rows."""


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
