"""From a model to a verified bundle: trace, lower, compare with PyTorch, write.

A bundle is only written once its artifact has given PyTorch's outputs and decisions on the golden clip.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from dvexport.bundle.archive import GOLDEN, Bundle, Content, write_bundle
from dvexport.bundle.levels import DENSE_LEVEL, GATE_LEVEL
from dvexport.bundle.limits import Limits
from dvexport.bundle.manifest import Manifest, ModelEntry, PassEntry, StateEntry
from dvexport.bundle.trust import has_code, remember
from dvexport.decisions import TOKENS
from dvexport.dialect.flops import flop_table
from dvexport.entries import gate_entries, input_entries, output_entries, token_entry
from dvexport.errors import CheckpointError, TraceError, UsageError, unknown_name
from dvexport.files import writable_output
from dvexport.graph.onnx_file import model_apart
from dvexport.graph.state import states_of
from dvexport.graph.weights import WEIGHTS, share_weights
from dvexport.names import MODES
from dvexport.passes.expose_probes import decision_values
from dvexport.passes.lowerings import Abilities, CostTable
from dvexport.passes.pipeline import Request
from dvexport.ports import Output, input_shapes, outputs_of
from dvexport.run.calibrate import gate_rates, gate_statistics
from dvexport.run.compare import compare, first_difference
from dvexport.run.feeds import Feeds, count, with_arrays
from dvexport.run.forced import draw
from dvexport.run.forced_check import not_equal, verified_runs
from dvexport.run.golden import golden_feeds, moving_texture, pack, sample_clip, torch_steps
from dvexport.run.seen import with_seen
from dvexport.run.session import Session, Step
from dvexport.targets import catalogue
from dvexport.targets.backend import Built
from dvexport.targets.registry import backend_of, best_backend
from dvexport.tokens import HasDenseForm
from dvexport.trace import trace

if TYPE_CHECKING:
    from torch import nn

    from dvexport.models.described import Description, Example

__all__ = ["build_model", "export", "file_digest", "traced_levels"]

_TOOLS = ("dvexport", "onnx", "onnx-ir", "onnxscript", "onnxsim", "torch")

Progress = Callable[[str], None]


def export(
    model: str | nn.Module,
    *,
    output: str | Path,
    checkpoint: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    assume_defaults: bool = False,
    weights_key: str | None = None,
    target: str = catalogue.HOST,
    backend: str | None = None,
    mode: str | None = None,
    lowering: Mapping[str, str] | None = None,
    opset: int | None = None,
    calibrate: str | Path | None = None,
    inputs: str | Path | Mapping[str, np.ndarray] | None = None,
    description: Description | None = None,
    example: Example | None = None,
    progress: Progress | None = None,
    **told: Any,
) -> Bundle:
    """Export a model to a bundle at `output`.

    Args:
        model: a name of the zoo, `package.module:factory`, a directory that Hugging Face's library saved,
            a `VideoModel`, or any module, which then needs `example`.
        output: written whole or not at all; the same export gives the same bytes. Native code is remembered as made
            here (`dvexport.bundle.trust`), if the user's list of exports can be written.
        checkpoint, settings, assume_defaults, weights_key: weights and options, see `dvexport.models.zoo.create`.
        target: name in the device catalogue, `host`, or a TOML file.
        backend: `tvm` or `onnx`; by default the best that is installed and fits (`targets.registry.best_backend`).
        mode: `stream` (a frame a step, explicit state) or `clip` (all frames at once); by default `stream`, and `clip`
            for a model that is not causal.
        lowering: lowering by gate, or by `*` for every gate that allows it; overrules the choice.
        opset: of ONNX, for backend `onnx`; by default the target's.
        calibrate: a video; the rates of its decisions decide the lowerings. By default the shipped
            clip of the model's labels, if there is one; otherwise half of everything is assumed.
        inputs: an .npz file, or arrays by name: the inputs beside the video to calibrate on, one row a frame.
        example: inputs for a module that is no `VideoModel`: a tensor, several in the order of its forward, or by
            name; frames first. Shapes are read off the example.
        told: what describes such a module: `preprocess`, `outputs`, `labels`, `causal`, `whole_clip`, as
            `models.described.Description` says.
        description: all of that as one object, in the place of `example` and `told`.
        progress: called with the name of each step as it begins.

    Raises:
        UsageError: an unknown name, an option that does not fit, an output that can't be written.
        CheckpointError: weights that are damaged, unsafe or not finite.
        UntoldError: weights that leave options open which change their numbers.
        ClipError: a calibration video that can't be read.
        TraceError: a model that can't be traced, or mixes frames in stream mode.
        CheckFailed: the artifact does not compute what PyTorch does. Nothing is written.
        DeviceError: ONNX Runtime is missing or fails.
    """
    tell = progress or (lambda _: None)
    device, backend = _check_request(backend, mode, target, lowering or {})
    maker = backend_of(backend)
    if opset is not None:
        device = maker.at_opset(device, opset)
    bundle_output(output)
    tell("load the model")
    told_of_it = _description(description, example, told)
    source = build_model(model, checkpoint, settings or {}, assume_defaults, told_of_it, weights_key)
    net = source.model
    mode = _mode_of(net, mode)
    preprocess = net.preprocess
    names = list(input_shapes(net))
    clip = sample_clip(net.labels) if calibrate is None and len(names) == 1 else None
    golden_frames = golden_feeds(net, _golden_frames(clip, preprocess))
    calibration_frames = _calibration_feeds(calibrate or clip, preprocess, names, inputs)
    limits = maker.limits([output.name for output in outputs_of(net)])
    tell("trace")
    traced, dense = traced_levels(net)
    calibration = _calibration(traced, calibration_frames)
    plan = _plan(mode, preprocess.frames, device, calibration, lowering or {})
    built = maker.build(traced, plan, device, tell, dense)
    lowered = built.lowered
    tell("compare with PyTorch")
    golden = _verified(Session(built.variant.open(), mode=mode), net, golden_frames, limits)
    runs = draw(traced, golden[0].decisions, count(golden_frames), preprocess.frames if mode == "clip" else None)
    if runs:
        tell("compare under forced decisions")
        forced = Session(built.forced().open(), mode=mode)
        runs, compared = verified_runs(forced, traced, net, golden_frames, runs, limits)
    tell("write the bundle")
    manifest = Manifest(
        model=_model_entry(source),
        target=device.name,
        backend=backend,
        mode="clip" if mode == "clip" else "stream",
        inputs=input_entries(net, mode),
        outputs=output_entries(lowered, mode, net),
        limits=limits,
        labels=list(net.labels),
        states=[StateEntry(**asdict(s)) for s in (states_of(lowered.model) if mode == "stream" else ())],
        gates=with_seen(gate_entries(traced, lowered), golden, compared if runs else None),
        flops=flop_table(traced, dense).to_dict(),
        checkpoint=source.digest,
        memory=dict(built.memory),
        tokens=token_entry(net),
        tools={name: version(name) for name in (*_TOOLS, *maker.tools)},
        passes=[
            PassEntry(
                name=record.name,
                modified=record.nodes_before != record.nodes_after,
                detail=f"{record.nodes_before} -> {record.nodes_after} nodes",
            )
            for record in lowered.log
        ],
    )
    golden_data = pack(golden_frames, golden, runs)
    files = {**built.files, **_levels(traced, dense, built), GOLDEN: golden_data}
    bundle = write_bundle(output, manifest, files, built.aligned)
    if not has_code(bundle.manifest):
        return bundle
    remember(bundle.manifest)
    return replace(bundle, trust=True)


def _levels(traced: ir.Model, dense: ir.Model | None, built: Built) -> dict[str, Content]:
    """Return the traced models as files, which share the artifact's weights."""
    levels = {GATE_LEVEL: traced} if dense is None else {GATE_LEVEL: traced, DENSE_LEVEL: dense}
    files: dict[str, Content] = {name: model_apart(level, built.weights)[0] for name, level in levels.items()}
    return {**files, WEIGHTS: built.weights} if built.weights.size else files


_FORMATS = (".onnx", ".tflite", ".so", ".pt", ".pth")
"""What files of a model alone are called."""


def bundle_output(path: str | Path) -> Path:
    """Return `path` after checking that a bundle can be written there; UsageError as `files.writable_output`."""
    path = writable_output(path)
    if path.suffix.lower() in _FORMATS:
        bundle = path.with_suffix(".dvx")
        raise UsageError(
            f"an export is a bundle, not a {path.suffix} file",
            where=str(path),
            why="the artifact ships with its weights, its manifest and what proves it",
            hint=f"-o {bundle}; then dvexport unpack {bundle} -o FOLDER gives the files inside",
        )
    return path


@dataclass(frozen=True)
class Source:
    """A model and how a bundle tells which one it is.

    Attributes:
        settings: the options given, as JSON values.
        digest: SHA-256 of the weights given; None where name and settings alone rebuild the model.
        weights_key: where they stand in their file, if that was said.
    """

    model: Any
    name: str
    settings: dict[str, Any]
    digest: str | None
    weights_key: str | None = None


def build_model(
    model: str | nn.Module,
    checkpoint: str | Path | None,
    settings: Mapping[str, Any],
    assume_defaults: bool = False,
    description: Description | None = None,
    weights_key: str | None = None,
) -> Source:
    """Return the model to export, in evaluation mode.

    Without a checkpoint an architecture of the zoo gets random weights, the same every time.

    Raises:
        UsageError: an unknown model or option, or a module that does not say enough of itself.
        CheckpointError: weights that are missing, damaged, unsafe or not finite.
    """
    if not isinstance(model, str):
        source = _given(model, checkpoint, settings, description)
    else:
        import torch

        from dvexport.models import zoo

        name, checkpoint = zoo.saved_directory(model, checkpoint)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            how = {"assume_defaults": assume_defaults, "description": description, "weights_key": weights_key}
            net = zoo.create(name, checkpoint, **how, **settings)  # type: ignore[arg-type]
        digest = None if checkpoint is None else file_digest(checkpoint)
        source = Source(net, name, _json_values(settings), digest, weights_key)
    _check_weights(source.model)
    return source


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file or a saved directory, in hexadecimal; CheckpointError if it can't be read."""
    if Path(path).is_dir():
        from dvexport.models.checkpoints.huggingface import directory_digest

        return directory_digest(path)
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            "the checkpoint can't be read", where=str(path), why=error.strerror or str(error)
        ) from error


def _description(given: Description | None, example: Example | None, told: Mapping[str, Any]) -> Description | None:
    """Return what is told of a module that is no `VideoModel`; None if nothing is."""
    if given is not None or (example is None and not told):
        return given
    from dvexport.models.described import Description, shapes_of

    known = Description.__dataclass_fields__.keys() - {"inputs", "fallback"}
    if unknown := [name for name in told if name not in known]:
        raise TypeError(f"export() got an unexpected keyword argument '{unknown[0]}'")
    if example is None:
        raise UsageError("a module is described by an example of its inputs", hint="example=torch.zeros(3, 3, H, W)")
    outputs = [one if isinstance(one, Output) else Output(one) for one in told.get("outputs", ())]
    return Description(shapes_of(example), **{**told, "outputs": outputs})


def _given(
    model: Any, checkpoint: str | Path | None, settings: Mapping[str, Any], description: Description | None
) -> Source:
    from dvexport.models.described import described

    if checkpoint is not None or settings:
        raise UsageError("a model object has its weights and options already", hint="leave out checkpoint and settings")
    net = described(model, type(model).__name__, description)
    return Source(net.eval(), net.name, {}, _weights_digest(net))


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_weights(model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError("the model has NaN or infinite weights", where=name)


def _model_entry(source: Source) -> ModelEntry:
    """Return how the model was made: what was given, what an import inferred and assumed (`models.importers`)."""
    report = source.model.import_report
    told = {} if report is None else {"inferred": report.inferred, "assumed": report.assumed}
    return ModelEntry(
        name=source.name,
        settings=source.settings,
        weights_key=source.weights_key,
        notes=[] if report is None else list(report.notes),
        **{key: _json_values(options) for key, options in told.items()},
    )


def _json_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def _check_request(
    backend: str | None, mode: str | None, target: str, lowering: Mapping[str, str]
) -> tuple[catalogue.Target, str]:
    """Return the target and the backend; UsageError or DeviceError where they don't fit."""
    if backend is not None:
        backend_of(backend)
    if mode is not None and mode not in MODES:
        raise unknown_name("mode", mode, MODES)
    device = catalogue.load(target)
    if backend is None:
        return device, best_backend(device, lowering)[0]
    backend_of(backend).check(device, lowering)
    return device, backend


def _mode_of(net: Any, mode: str | None) -> str:
    if mode is None:
        return "stream" if net.causal else "clip"
    if mode == "stream" and not net.causal:
        frames = net.preprocess.frames
        why = "a frame's result depends on later frames"
        if net.whole_clip:
            why = f"it reads a clip of {frames} frames as one, and gives one result for it"
        raise UsageError(f"{net.name} can't be exported in stream mode", why=why, hint="use --mode clip")
    return mode


def traced_levels(net: Any) -> tuple[ir.Model, ir.Model | None]:
    """Return a model traced, and traced without pruning where it chooses tokens; equal weights are the same arrays.

    Raises:
        TraceError: a model that can't be traced, or chooses tokens and has no dense version.
    """
    traced = trace(net, input_shapes(net))
    if not any(kind == TOKENS.name for _, kind in decision_values(traced)):
        return traced, None
    if not isinstance(net, HasDenseForm):
        raise TraceError(
            "the model chooses tokens, and offers no dense version of itself",
            where=type(net).__name__,
            hint="define without_pruning(), see docs/adding-a-model.md",
        )
    dense = trace(net.without_pruning(), input_shapes(net))
    share_weights(traced, dense)
    return traced, dense


def _golden_frames(clip: Path | None, preprocess: Any) -> np.ndarray:
    from dvexport.video.clips import read_clip

    return moving_texture(preprocess, preprocess.frames) if clip is None else read_clip(clip, preprocess).frames


def _calibration_feeds(
    clip: str | Path | None, preprocess: Any, names: list[str], inputs: str | Path | Mapping[str, np.ndarray] | None
) -> Feeds | None:
    """Return every input of a calibration clip; None without a clip."""
    from dvexport.video.clips import read_clip

    if clip is not None:
        return with_arrays(read_clip(clip, preprocess), names, inputs, clip)
    if inputs is not None:
        raise UsageError("inputs are given without the video that they belong to", hint="give calibrate too")
    return None


def _calibration(traced: ir.Model, frames: Feeds | None) -> list[Step]:
    """Return the decisions on the calibration frames; none without frames or decisions."""
    from dvexport.run.oracle import Oracle

    if frames is None or not any(kind != TOKENS.name for _, kind in decision_values(traced)):
        return []
    return Oracle(traced).run_clip(frames)


def _plan(
    mode: str, frames: int, device: catalogue.Target, calibration: Sequence[Step], overrides: Mapping[str, str]
) -> Request:
    return Request(
        mode=mode,
        frames=frames,
        abilities=Abilities(device.conditional, device.dynamic_shapes),
        costs=CostTable(device.costs) if device.costs else None,
        rates=gate_rates(calibration),
        overrides=overrides,
        statistics=gate_statistics(calibration),
    )


def _verified(session: Session, net: Any, frames: Feeds, limits: Limits) -> list[Step]:
    """Return what PyTorch gives on the golden clip, once the artifact gave the same.

    Decisions that the model does not tell are taken from the artifact. PyTorch follows the tokens that the artifact
    chose, and tells those it would have chosen.
    """
    got = session.run_clip(frames)
    want = torch_steps(net, frames, follow=got)
    _check_finite(want, type(net).__name__)
    failed = [row for row in compare("artifact against PyTorch", got, want, limits) if not row.ok]
    if failed:
        raise not_equal(failed[0], first_difference(got, want))
    return [Step(w.outputs, {**g.decisions, **w.decisions}) for g, w in zip(got, want, strict=True)]


def _check_finite(steps: Sequence[Step], where: str) -> None:
    for frame, step in enumerate(steps):
        for name, value in step.outputs.items():
            if not np.isfinite(value).all():
                raise TraceError(
                    f"the model itself gives numbers that are not finite, in its output '{name}'",
                    where=where,
                    why=f"frame {frame} of the golden clip gives NaN or infinity in PyTorch",
                    hint="check its weights, and what it divides by",
                )
