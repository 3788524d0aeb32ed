"""The native backend: kernels compiled with TVM, a static plan and a C runtime of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dvexport.bundle.limits import Limits
from dvexport.errors import TraceError, UsageError
from dvexport.graph.weights import WeightFile
from dvexport.targets.backend import Built, Progress, not_available
from dvexport.targets.catalogue import HOST, Target, load, runs_here
from dvexport.targets.runtime import Variant
from dvexport.targets.tvm.native_files import HEADER, LIBRARY, NATIVE_WEIGHTS, RUNNER, plan_file
from dvexport.targets.tvm.passes import PASSES
from dvexport.targets.tvm.table import TvmTable

if TYPE_CHECKING:
    import onnx_ir as ir

    from dvexport.bundle.archive import Bundle
    from dvexport.bundle.manifest import Manifest
    from dvexport.passes.pipeline import Lowered, Request

__all__ = ["BACKEND", "TvmBackend"]


class TvmBackend:
    """Kernels compiled with TVM, a static plan and a C runtime of our own."""

    tools: tuple[str, ...] = ("apache-tvm", "ziglang")
    passes = PASSES
    rank = 0  # its kernels follow every decision
    loading = f"link {LIBRARY} into a program ({HEADER} says how), or run {RUNNER} on the device"
    remedy = "Train sparser decisions, or ship a model without gates."

    def check(self, device: Target, lowering: Mapping[str, str]) -> None:
        """See `Backend`."""
        from dvexport.targets.tvm.build.compile import check_tools

        if device.runtime(TvmTable) is None:
            raise not_available("compiled kernels", device)
        if lowering:
            raise UsageError(
                "backend 'tvm' takes no lowerings",
                why="its kernels follow every decision, and are chosen at run time",
                hint="leave out --lowering, or use --backend onnx",
            )
        check_tools()

    def at_opset(self, device: Target, opset: int) -> Target:
        """See `Backend`: there is none."""
        raise UsageError("backend 'tvm' writes machine code, which has no opset", hint="leave out --opset")

    def limits(self, outputs: Sequence[str]) -> Limits:
        """See `Backend`: what float32 keeps."""
        return Limits().naming(outputs)

    def build(
        self, traced: ir.Model, plan: Request, device: Target, tell: Progress, dense: ir.Model | None = None
    ) -> Built:
        """See `Backend`. An artifact for another processor is compared with PyTorch by its twin for this one."""
        from dvexport.targets.tvm.artifact import build_artifact
        from dvexport.targets.tvm.machine.machine import machine_for

        tell("lower the gates")
        lowered = _native_variants(traced, plan, dense)
        models = {name: made.model for name, made in lowered.items()}
        said = device.runtime(TvmTable)
        assert said is not None
        algorithms = ("direct", "winograd") if said.winograd else ("direct",)
        threads = device.cpu.most_threads
        artifact = build_artifact(models, machine_for(device), tell, algorithms, threads)
        twin = artifact
        if not runs_here(device.cpu):
            tell("build the twin for this machine")
            twin = build_artifact(models, machine_for(load(HOST)), tell, algorithms, threads)
        frames = plan.frames if plan.mode == "clip" else 1
        weights = WeightFile(held=artifact.held)
        gated, files = twin.variant("gated", frames), artifact.files()
        return Built(lowered["gated"], gated, lambda: twin.variant("forced", frames), files, artifact.memory, weights)

    def variant(self, bundle: Bundle, variant: str) -> Variant:
        """All variants are plans over one library and one file of weights, and in the bundle."""
        from dvexport.targets.tvm.artifact import read_variant

        return read_variant(bundle, variant)

    def needed(self, bundle: Bundle) -> Mapping[str, int]:
        """See `Backend`: the library, its weights and the plan."""
        names = (LIBRARY, NATIVE_WEIGHTS, plan_file("gated"))
        return {name: bundle.manifest.files[name].size for name in names}

    def runtime(self, manifest: Manifest) -> tuple[str, str]:
        """Our C runtime of the release that exported: it is inside the artifact."""
        return "dvexport native", manifest.tools["dvexport"]


def _native_variants(traced: ir.Model, plan: Request, dense: ir.Model | None = None) -> dict[str, Lowered]:
    """Return every variant lowered for kernels. A clip of a causal model is its stream, step by step."""
    from dvexport.targets.tvm.passes import lower

    plans = {"gated": plan, "dense": replace(plan, variant="dense"), "forced": replace(plan, forced=True)}
    levels = {name: dense if name == "dense" and dense is not None else traced for name in plans}
    try:
        return {name: lower(levels[name], replace(one, mode="stream")) for name, one in plans.items()}
    except TraceError:
        if plan.mode == "stream":
            raise
    return {name: lower(levels[name], one) for name, one in plans.items()}


BACKEND = TvmBackend()
