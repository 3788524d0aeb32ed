"""Networks compiled for this machine, as the benchmarks open and store them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from dvexport.targets.catalogue import load
from dvexport.targets.tvm.artifact import NativeArtifact, build_artifact
from dvexport.targets.tvm.calls.draft import ALGORITHMS
from dvexport.targets.tvm.machine.machine import Machine, machine_of
from dvexport.targets.tvm.session import NativeSession

__all__ = ["Compiled", "compile_network", "host"]


@dataclass(frozen=True)
class Compiled:
    """An artifact for this machine."""

    artifact: NativeArtifact

    def open(self, variant: str, *, threads: int = 1, profile: bool = False) -> NativeSession:
        """Open a variant."""
        made = self.artifact
        return NativeSession(made.library, made.plans[variant], made.weights, threads=threads, profile=profile)

    def save(self, variant: str, folder: Path) -> None:
        """Write what `adapters.Native` reads."""
        made = self.artifact
        files = {"library.so": made.library, "step.plan": made.plans[variant], "weights.bin": made.weights}
        for name, content in files.items():
            (folder / name).write_bytes(content)


def compile_network(
    models: Mapping[str, ir.Model], machine: Machine, algorithms: Collection[str] = ALGORITHMS
) -> Compiled:
    """Compile the variants of a model, lowered for kernels; `gated` has to be among them."""
    return Compiled(build_artifact(models, machine, lambda _: None, algorithms))


def host() -> Machine:
    """Return this machine as the code generator sees it."""
    return machine_of(load("host").cpu)
