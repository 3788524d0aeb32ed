"""`[runtimes.tvm]` of a target file."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from dvexport.targets.table import Table
from dvexport.targets.tvm.machine.rates import Parameters, Rates, TypedRates

__all__ = ["TABLE", "TvmTable"]


class TvmTable(Table):
    """Compiled kernels with a C runtime of our own: nothing needs to be installed on the device.

    Attributes:
        rates: how long a kernel's units of work take there, by element type (`dvexport tune`); None: estimated.
        parameters: what its convolution kernels are generated with (`dvexport tune`); None: as for its instruction set.
        winograd: whether convolutions may be Winograd's, two to three times as fast where they apply, for
            weights that take up to three times the memory.
    """

    rates: Annotated[TypedRates, BeforeValidator(TypedRates.read)] | None = None
    parameters: Parameters | None = None
    winograd: bool = True

    def facts(self) -> list[tuple[str, str]]:
        """Return where its rates and parameters are from."""
        return [
            ("kernel rates", _source(self.rates.f32 if self.rates else None, "estimated from lanes and peak")),
            ("kernel parameters", _source(self.parameters, "those of its instruction set")),
        ]


def _source(measured: Rates | Parameters | None, otherwise: str) -> str:
    return measured.source if measured else f"{otherwise} (dvexport tune measures them)"


TABLE = TvmTable
