"""The backends by name: how each makes an artifact of a traced model, and opens the one in a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dvexport.errors import TraceError, UsageError, unknown_name
from dvexport.graph import depends_on_input, whole_clip_of
from dvexport.targets.devices import HOST, Target, load, runs_here
from dvexport.targets.runtime import Variant
from dvexport.weights import WeightFile, external_arrays

if TYPE_CHECKING:
    import onnx_ir as ir

    from dvexport.bundle import Bundle
    from dvexport.bundle_manifest import Manifest
    from dvexport.passes.pipeline import Lowered, Plan
    from dvexport.targets.onnx.runtime import OnnxVariant

__all__ = ["BACKENDS", "Backend", "Built", "backend_of", "onnx_variant"]

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Built:
    """What a backend made of a model.

    Attributes:
        lowered: the gated variant's graph, as it was handed to the backend.
        variant: the gated variant, to be opened on this machine.
        forced: makes the variant whose decisions are inputs, of the same lowerings, to be opened on this machine.
        files: what the bundle gets, by name.
        memory: bytes on the device by use, where the backend knows them.
        weights: those that the files refer to as `dvexport.weights.WEIGHTS`, empty where each file holds its own; and
            what the files hold that graphs may refer to.
    """

    lowered: Lowered
    variant: Variant
    forced: Callable[[], Variant]
    files: Mapping[str, bytes | memoryview | Path]
    memory: Mapping[str, int] = field(default_factory=dict)
    weights: WeightFile = field(default_factory=WeightFile)


class Backend(Protocol):
    """A backend.

    Attributes:
        tools: packages whose versions have a part in an artifact.
    """

    tools: tuple[str, ...]

    def check(self, device: Target, lowering: Mapping[str, str]) -> None:
        """Raise UsageError where a request can't be met, DeviceError where a package is missing."""

    def build(
        self, traced: ir.Model, plan: Plan, device: Target, tell: Progress, dense: ir.Model | None = None
    ) -> Built:
        """Lower a traced model as `plan` says and make its artifact.

        Args:
            dense: the model without pruning, where it had to be traced apart since its shapes differ.
        """

    def variant(self, bundle: Bundle, variant: str) -> Variant:
        """Return a variant of a bundle: `gated`, `dense` or `forced`."""

    def runtime(self, manifest: Manifest) -> tuple[str, str]:
        """Return the name and version of what executes a bundle's artifact on this machine."""


class OnnxBackend:
    """Standard operators for ONNX Runtime."""

    tools: tuple[str, ...] = ("onnxruntime",)

    def check(self, device: Target, lowering: Mapping[str, str]) -> None:
        """See `Backend`."""
        from dvexport.passes.choose_lowering import LOWERINGS

        for kind in lowering.values():
            if kind not in LOWERINGS:
                raise unknown_name("lowering", kind, LOWERINGS)
        if device.runtimes.onnx is None:
            raise _not_available("ONNX Runtime", device)

    def build(
        self, traced: ir.Model, plan: Plan, device: Target, tell: Progress, dense: ir.Model | None = None
    ) -> Built:
        """See `Backend`. The dense variant is made from the bundle when it is asked for."""
        from dvexport.passes.pipeline import lower
        from dvexport.state import states_of
        from dvexport.targets.onnx.backend import ARTIFACT, emit, emit_apart
        from dvexport.targets.onnx.runtime import OnnxVariant

        assert device.runtimes.onnx is not None
        tell("lower the gates")
        lowered = lower(traced, plan)
        opset, file = device.runtimes.onnx.opset, WeightFile()
        again = replace(plan, forced=True, overrides={choice.gate: choice.lowering for choice in lowered.choices})
        if whole_clip_of(traced) is None:
            gated = OnnxVariant(emit(lowered.model, opset=opset), states_of(lowered.model))
        else:
            artifact, weights = emit_apart(lowered.model, file, opset=opset)
            gated = OnnxVariant(artifact, (), weights)
        forced = partial(_forced_onnx, gated, traced, again)
        return Built(lowered, gated, forced, {ARTIFACT: gated.model}, weights=file)

    def variant(self, bundle: Bundle, variant: str) -> Variant:
        """What ships is read, and forced as it is; `dense` is made from the traced model."""
        from dvexport.bundle_graphs import read_graph
        from dvexport.session import plan_of, read_level
        from dvexport.targets.onnx.backend import ARTIFACT
        from dvexport.targets.onnx.runtime import OnnxVariant

        plan = plan_of(bundle.manifest, variant)
        if variant == "dense":
            return onnx_variant(read_level(bundle, variant), plan)
        graph = read_graph(bundle, ARTIFACT)
        weights = external_arrays(graph, bundle.array, where=str(bundle.path))
        # Written anew: the runtime gets what was checked, and not what another reader may see in the same bytes.
        gated = OnnxVariant(graph.SerializeToString(deterministic=True), bundle.manifest.states, weights)
        return gated if variant == "gated" else _forced_onnx(gated, read_level(bundle, variant), plan)

    def runtime(self, manifest: Manifest) -> tuple[str, str]:
        """The package that is installed here."""
        return "onnxruntime", version("onnxruntime")


class TvmBackend:
    """Kernels compiled with TVM, a static plan and a C runtime of our own."""

    tools: tuple[str, ...] = ("apache-tvm", "ziglang")

    def check(self, device: Target, lowering: Mapping[str, str]) -> None:
        """See `Backend`."""
        from dvexport.targets.tvm.build import check_tools

        if device.runtimes.tvm is None:
            raise _not_available("compiled kernels", device)
        if lowering:
            raise UsageError(
                "backend 'tvm' takes no lowerings",
                why="its kernels follow every decision, and are chosen at run time",
                hint="leave out --lowering, or use --backend onnx",
            )
        check_tools()

    def build(
        self, traced: ir.Model, plan: Plan, device: Target, tell: Progress, dense: ir.Model | None = None
    ) -> Built:
        """See `Backend`. An artifact for another processor is compared with PyTorch by its twin for this one."""
        from dvexport.targets.tvm.artifact import build_artifact
        from dvexport.targets.tvm.machine import machine_for

        tell("lower the gates")
        lowered = _native_variants(traced, replace(plan, kernels=True), dense)
        models = {name: made.model for name, made in lowered.items()}
        assert device.runtimes.tvm is not None
        algorithms = ("direct", "winograd") if device.runtimes.tvm.winograd else ("direct",)
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

    def runtime(self, manifest: Manifest) -> tuple[str, str]:
        """Our C runtime of the release that exported: it is inside the artifact."""
        return "dvexport native", manifest.tools["dvexport"]


def _forced_onnx(gated: OnnxVariant, gate_level: ir.Model, plan: Plan) -> Variant:
    """Force an artifact as it is; lower it anew, forced, where what it shows is not all that would have to be.

    So are models that choose tokens: what a selection hands on must follow, and not only who reads its places.
    """
    from dvexport.passes.expose_probes import decision_values, forced_alone
    from dvexport.targets.onnx.force import force_artifact

    decided = decision_values(gate_level)
    if any(kind == "tokens" for _, kind in decided):
        return onnx_variant(gate_level, plan)
    forced, read = force_artifact(gated.model)
    followed = {value for key, value in decided.items() if key in read or not depends_on_input(value)}
    if forced_alone(gate_level) and followed >= set(decided.values()):
        return replace(gated, model=forced)
    return onnx_variant(gate_level, plan)


def onnx_variant(gate_level: ir.Model, plan: Plan) -> Variant:
    """Lower a gate-level model as `plan` says, for ONNX Runtime on this machine."""
    from dvexport.passes.pipeline import lower
    from dvexport.state import states_of
    from dvexport.targets.onnx.backend import emit_apart
    from dvexport.targets.onnx.runtime import OnnxVariant

    lowered = lower(gate_level, plan)
    text, weights = emit_apart(lowered.model)
    return OnnxVariant(text, states_of(lowered.model), weights)


def _native_variants(traced: ir.Model, plan: Plan, dense: ir.Model | None = None) -> dict[str, Lowered]:
    """Return every variant lowered for kernels. A clip of a causal model is its stream, step by step."""
    from dvexport.passes.pipeline import lower

    plans = {"gated": plan, "dense": replace(plan, variant="dense"), "forced": replace(plan, forced=True)}
    levels = {name: dense if name == "dense" and dense is not None else traced for name in plans}
    try:
        return {name: lower(levels[name], replace(one, mode="stream")) for name, one in plans.items()}
    except TraceError:
        if plan.mode == "stream":
            raise
    return {name: lower(levels[name], one) for name, one in plans.items()}


def _not_available(what: str, device: Target) -> UsageError:
    return UsageError(
        f"target '{device.name}' does not run {what}",
        why=f"its runtimes are: {', '.join(device.runtimes.available)}",
    )


BACKENDS: dict[str, Backend] = {"onnx": OnnxBackend(), "tvm": TvmBackend()}
LATER_BACKENDS = ("tflite",)


def backend_of(name: str) -> Backend:
    """Return a backend; UsageError if there is none of that name."""
    if name in LATER_BACKENDS:
        raise UsageError(f"backend '{name}' is not in this release", hint=f"one of: {', '.join(BACKENDS)}")
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    return BACKENDS[name]
