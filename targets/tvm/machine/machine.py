"""What kernels are generated for: the parts of a target that change the code."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dvexport.targets.tvm.machine import by_lanes
from dvexport.targets.tvm.machine.rates import Parameters, TypedRates
from dvexport.targets.tvm.table import TvmTable

if TYPE_CHECKING:
    from dvexport.targets.catalogue import Cpu, Target

__all__ = ["Machine", "machine_for", "machine_of"]


@dataclass(frozen=True)
class Machine:
    """A processor as the code generator sees it.

    Attributes:
        triple: LLVM target triple.
        mcpu: LLVM processor name.
        features: LLVM features beyond those of `mcpu`, such as `+neon`.
        lanes: float32 lanes of a vector register.
        block: output channels x vectors of a matrix product's register block.
        rates: how long its units of work take by element type, where that is known.
        parameters: what its convolutions are generated with, where somebody measured that.
    """

    triple: str
    mcpu: str
    features: tuple[str, ...]
    lanes: int
    block: tuple[int, int]
    rates: TypedRates | None = None
    parameters: Parameters | None = None

    @property
    def tvm_target(self) -> dict[str, Any]:
        """The target as TVM wants it: a JSON dict."""
        target: dict[str, Any] = {
            "kind": "llvm",
            "mtriple": self.triple,
            "mcpu": self.mcpu,
            "cl-opt": ["-unroll-runtime:bool=false"],  # remainder loops are written out already
        }
        if self.features:
            target["mattr"] = list(self.features)
        return target

    @property
    def registers(self) -> int:
        """How many vector registers there are."""
        return 32 if self.lanes == 16 or self.is_aarch64 else 16

    @functools.cached_property
    def is_x86(self) -> bool:
        """Whether the instruction set is x86-64."""
        return self.triple.startswith("x86_64")

    @functools.cached_property
    def is_aarch64(self) -> bool:
        """Whether the instruction set is AArch64."""
        return self.triple.startswith("aarch64")


def machine_of(cpu: Cpu) -> Machine:
    """Return what code for a catalogue entry's processor is generated for."""
    is_aarch64 = cpu.triple.startswith("aarch64")
    block = by_lanes.convolution_block(cpu.lanes, is_aarch64)
    features = tuple(cpu.features)
    if cpu.triple.startswith("arm") and not any("neon" in feature for feature in features):
        features += ("+neon",)
    return Machine(cpu.triple, cpu.mcpu, features, cpu.lanes, block)


def machine_for(target: Target) -> Machine:
    """Return what code for a device is generated for, with its rates, or those that its peak suggests."""
    machine, said = machine_of(target.cpu), target.runtime(TvmTable)
    rates = said.rates if said else None
    if rates is None or rates.f32 is None:
        rates = TypedRates(f32=by_lanes.estimate(machine.lanes, target.peak_gflops_per_core.value))
    return replace(machine, rates=rates, parameters=said.parameters if said else None)
