"""The ONNX Runtime backend: standard operators only, so the artifact runs in a stock runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from dvexport.bundle.limits import Limits
from dvexport.decisions import TOKENS
from dvexport.errors import unknown_name
from dvexport.graph.graph import OPSET, depends_on_input
from dvexport.graph.weights import WEIGHTS, WeightFile, external_arrays, weights_read
from dvexport.numbers import whole_number
from dvexport.targets.backend import Built, Progress, not_available
from dvexport.targets.catalogue import Target
from dvexport.targets.onnx.opset import OLDEST
from dvexport.targets.onnx.passes import PASSES
from dvexport.targets.onnx.table import OnnxTable, newest_opset
from dvexport.targets.runtime import Variant

if TYPE_CHECKING:
    import onnx_ir as ir

    from dvexport.bundle.archive import Bundle
    from dvexport.bundle.manifest import Manifest
    from dvexport.passes.pipeline import Request
    from dvexport.targets.onnx.runtime import OnnxVariant

__all__ = ["BACKEND", "OnnxBackend", "onnx_variant", "plan_of"]


class OnnxBackend:
    """Standard operators for ONNX Runtime."""

    tools: tuple[str, ...] = ("onnxruntime",)
    passes = PASSES
    rank = 1
    loading = "onnxruntime.InferenceSession opens model.onnx, which reads weights.bin beside it"
    remedy = (
        "Try --backend tvm, whose kernels follow each decision, or the lowerings named below, "
        "or ship a model without gates."
    )

    def check(self, device: Target, lowering: Mapping[str, str]) -> None:
        """See `Backend`."""
        from dvexport.passes.lowerings import LOWERINGS

        for kind in lowering.values():
            if kind not in LOWERINGS:
                raise unknown_name("lowering", kind, LOWERINGS)
        if device.runtime(OnnxTable) is None:
            raise not_available("ONNX Runtime", device)

    def at_opset(self, device: Target, opset: int) -> Target:
        """See `Backend`."""
        said = device.runtime(OnnxTable)
        assert said is not None
        newest = min(OPSET, newest_opset(said.min_version))
        whole_number(opset, "an opset", least=OLDEST, most=newest, why=f"'{device.name}' reads no others")
        told = said.model_copy(update={"opset": opset})
        runtimes = {name: told if each is said else each for name, each in device.runtimes.items()}
        return device.model_copy(update={"runtimes": runtimes})

    def limits(self, outputs: Sequence[str]) -> Limits:
        """See `Backend`: what float32 keeps."""
        return Limits().naming(outputs)

    def build(
        self, traced: ir.Model, plan: Request, device: Target, tell: Progress, dense: ir.Model | None = None
    ) -> Built:
        """See `Backend`. The dense variant is made from the bundle when it is asked for."""
        from dvexport.graph.state import states_of
        from dvexport.targets.onnx.emit import ARTIFACT, emit_apart
        from dvexport.targets.onnx.passes import lower
        from dvexport.targets.onnx.runtime import OnnxVariant

        said = device.runtime(OnnxTable)
        assert said is not None
        tell("lower the gates")
        lowered = lower(traced, plan)
        opset, file = said.opset, WeightFile()
        again = replace(plan, forced=True, overrides={choice.gate: choice.lowering for choice in lowered.choices})
        artifact, weights = emit_apart(lowered.model, file, opset=opset)
        gated = OnnxVariant(artifact, states_of(lowered.model), weights)
        forced = partial(_forced_onnx, gated, traced, again)
        return Built(lowered, gated, forced, {ARTIFACT: gated.model}, weights=file)

    def variant(self, bundle: Bundle, variant: str) -> Variant:
        """What ships is read, and forced as it is; `dense` is made from the traced model."""
        from dvexport.bundle.graphs import read_graph
        from dvexport.bundle.levels import read_level
        from dvexport.targets.onnx.emit import ARTIFACT
        from dvexport.targets.onnx.runtime import OnnxVariant

        plan = plan_of(bundle.manifest, variant)
        if variant == "dense":
            return onnx_variant(read_level(bundle, variant), plan)
        graph = read_graph(bundle, ARTIFACT)
        weights = external_arrays(graph, bundle.array, where=str(bundle.path))
        # Written anew: the runtime gets what was checked, and not what another reader may see in the same bytes.
        gated = OnnxVariant(graph.SerializeToString(deterministic=True), bundle.manifest.states, weights)
        return gated if variant == "gated" else _forced_onnx(gated, read_level(bundle, variant), plan)

    def needed(self, bundle: Bundle) -> Mapping[str, int]:
        """See `Backend`: the graph, and the weights up to the last that it reads."""
        from dvexport.bundle.graphs import read_graph
        from dvexport.targets.onnx.emit import ARTIFACT

        read = weights_read(read_graph(bundle, ARTIFACT))
        return {ARTIFACT: bundle.manifest.files[ARTIFACT].size, **({WEIGHTS: read} if read else {})}

    def runtime(self, manifest: Manifest) -> tuple[str, str]:
        """The package that is installed here."""
        return "onnxruntime", version("onnxruntime")


def _forced_onnx(gated: OnnxVariant, gate_level: ir.Model, plan: Request) -> Variant:
    """Force an artifact as it is; lower it anew, forced, where what it shows is not all that would have to be.

    So are models that choose tokens: what a selection hands on must follow, and not only who reads its places.
    """
    from dvexport.passes.expose_probes import decision_values, forced_alone
    from dvexport.targets.onnx.force import force_artifact

    decided = decision_values(gate_level)
    if any(kind == TOKENS.name for _, kind in decided):
        return onnx_variant(gate_level, plan)
    forced, read = force_artifact(gated.model)
    followed = {value for key, value in decided.items() if key in read or not depends_on_input(value)}
    if forced_alone(gate_level) and followed >= set(decided.values()):
        return replace(gated, model=forced)
    return onnx_variant(gate_level, plan)


def onnx_variant(gate_level: ir.Model, plan: Request) -> Variant:
    """Lower a gate-level model as `plan` says, for ONNX Runtime on this machine."""
    from dvexport.graph.state import states_of
    from dvexport.targets.onnx.emit import emit_apart
    from dvexport.targets.onnx.passes import lower
    from dvexport.targets.onnx.runtime import OnnxVariant

    lowered = lower(gate_level, plan)
    text, weights = emit_apart(lowered.model)
    return OnnxVariant(text, states_of(lowered.model), weights)


def plan_of(manifest: Manifest, variant: str) -> Request:
    """Return the plan that makes a variant of an ONNX bundle, every gate lowered as in its artifact."""
    from dvexport.passes.pipeline import Request

    return Request(
        mode=manifest.mode,
        frames=manifest.inputs[0].shape[0],
        variant="dense" if variant == "dense" else "gated",
        forced=variant == "forced",
        overrides={gate.name: gate.lowering for gate in manifest.gates if gate.kind != TOKENS.over},
    )


BACKEND = OnnxBackend()
