"""What the convolution kernels of a target are generated with, where processors of one instruction set differ.

A register block is output channels by vectors of pixels (or of Winograd's tiles) whose sums stay in registers. Which
one is fastest depends on how many numbers a processor loads and multiplies in a cycle, and on its memory; `dvexport
tune` measures it (`tuning/parameters.py`), and a target's file keeps it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dvexport.targets.tvm.machine.machine import Machine

from dvexport.targets.tvm.machine import by_lanes
from dvexport.targets.tvm.machine.rates import Parameters

__all__ = ["TALL", "fits", "parameters_of"]

TALL = 2
"""Vectors of pixels up to which a block has `Parameters.tall` rows."""


def parameters_of(machine: Machine) -> Parameters:
    """Return the parameters of a machine; where nobody says, those of its instruction set."""
    return machine.parameters or by_lanes.parameters(machine.lanes, machine.is_aarch64)


def fits(rows: int, vectors: int, machine: Machine) -> bool:
    """Tell whether a register block leaves registers for its pixels and its weights.

    AArch64 multiplies by one lane of a register and loads four weights of a row at once; elsewhere a weight is repeated
    in all lanes of one register, which AVX-512 does within the multiplication.
    """
    weights = rows if machine.is_aarch64 else 0 if machine.lanes == 16 else 1
    return rows * vectors + vectors + weights <= machine.registers
