"""Any task: a segmenter and a detector of two inputs, from an ordinary module to a profile, by names."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import save
from torch import nn

import dvexport
from dvexport.bundle.archive import GOLDEN, Bundle, write_bundle
from dvexport.bundle.limits import Limits
from dvexport.bundle.manifest import parse_manifest
from dvexport.errors import BundleError, CheckFailed, TraceError, UsageError
from dvexport.export import export
from dvexport.models.base import imagenet_preprocess
from dvexport.ports import Output
from dvexport.profile import profile
from dvexport.run.compare import compare, output_error
from dvexport.run.feeds import read_arrays
from dvexport.run.open import open_session
from dvexport.run.session import Step
from dvexport.targets.onnx.backend import BACKEND
from dvexport.targets.onnx.emit import emit
from dvexport.verify import verify
from tests.support.bundles import small_bundle, small_model
from tests.support.task_models import CLIP, DETECTOR, FLOW, LABELS, SEGMENTER, SIZE, clip_feeds, detector, segmenter

pytestmark = pytest.mark.slow

TASKS = {"segmenter": (segmenter, SEGMENTER), "detector": (detector, DETECTOR)}
EVERY = pytest.mark.parametrize(
    ("task", "backend", "mode"),
    [(task, backend, mode) for task in TASKS for backend, mode in (("onnx", "stream"), ("onnx", "clip"))]
    + [pytest.param(task, "tvm", mode, marks=pytest.mark.slow) for task in TASKS for mode in ("stream", "clip")],
)
PREPROCESS = imagenet_preprocess(SIZE, CLIP)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="dvexport-tests-")


@functools.cache
def bundle_of(task: str, backend: str = "onnx", mode: str = "stream") -> Bundle:
    """A bundle, made once."""
    make, told = TASKS[task]
    if backend == "tvm":
        pytest.importorskip("tvm")
    path = Path(_folder().name) / f"{task}-{backend}-{mode}.dvx"
    return dvexport.export(make(), output=path, backend=backend, mode=mode, **told)


def eager(task: str, feeds) -> dict[str, np.ndarray]:
    """What the module gives, by the names of its bundle."""
    with torch.no_grad():
        result = TASKS[task][0]()(*map(torch.from_numpy, feeds.values()))
    named = result if isinstance(result, dict) else dict(zip(("boxes", "scores"), result, strict=True))
    return {name: value.numpy() for name, value in named.items()}


@EVERY
def test_a_bundle_gives_what_pytorch_gives(task, backend, mode):
    bundle = bundle_of(task, backend, mode)
    feeds = clip_feeds(flow=task == "detector")
    want = eager(task, feeds)
    with open_session(bundle) as session:
        steps = session.run_clip(feeds)
        assert list(session.inputs) == list(feeds)
    assert list(steps[0].outputs) == list(want)
    for name, value in want.items():
        got = np.stack([step.outputs[name] for step in steps])
        np.testing.assert_allclose(got, value, atol=1e-4 * np.ptp(value), rtol=0, err_msg=name)


@EVERY
def test_verify_compares_every_output_by_its_name_with_gates_forced(task, backend, mode):
    report = verify(bundle_of(task, backend, mode), model=TASKS[task][0]())
    assert report.ok and report.notes == ()
    names = {row.name for row in report.rows}
    outputs = ("masks", "features") if task == "segmenter" else ("boxes", "scores")
    for witness in ("golden data", "gate-level oracle", "PyTorch", "forced decisions, PyTorch", "again after a reset"):
        assert {f"{witness}: {output}" for output in outputs} <= names
    assert all(not gate.missing for gate in report.gates if gate.kind == "tiles")


@EVERY
def test_a_profile_measures_models_that_are_no_classifiers(task, backend, mode):
    result = profile(bundle_of(task, backend, mode), runs=1, warmup_s=0)
    assert len(result.steps) == CLIP
    assert all(step.label is None and step.prob is None and step.latency_ms > 0 for step in result.steps)
    forced = profile(bundle_of(task, backend, mode), runs=1, warmup_s=0, force={"tiles": 0.25})
    assert sum(step.executed_macs for step in forced.steps) < sum(step.dense_macs for step in forced.steps)


def test_the_manifest_says_what_inputs_and_outputs_are():
    manifest = bundle_of("detector").manifest
    assert [(one.name, one.shape, one.preprocess is None) for one in manifest.inputs] == [
        ("frames", (1, 3, *SIZE), False),
        ("flow", (1, *FLOW), True),
    ]
    assert manifest.declared_outputs == (Output("boxes", "boxes"), Output("scores", "scores", tuple(LABELS)))
    assert manifest.labels == []
    assert manifest.limits == Limits(outputs={"boxes": 1e-3, "scores": 1e-3})
    segments = bundle_of("segmenter").manifest
    assert segments.declared_outputs == (Output("masks", "map", tuple(LABELS)), Output("features"))


def test_a_backend_states_its_own_limits(tmp_path, monkeypatch):
    own = Limits(outputs={"masks": 0.25}, decisions=0.5)
    monkeypatch.setattr(type(BACKEND), "limits", lambda self, outputs: own)
    bundle = export(segmenter(), backend="onnx", output=tmp_path / "a.dvx", **SEGMENTER)
    assert Bundle.open(bundle.path).manifest.limits == own
    limits = {row.name: row.limit for row in verify(bundle).rows}
    assert limits["golden data: masks"] == 0.25 and limits["golden data: features"] == 1e-3
    assert limits["golden data: decisions that differ, of 288"] == 144
    monkeypatch.setattr(type(BACKEND), "limits", lambda self, outputs: Limits(outputs={"features": 0.0}))
    with pytest.raises(CheckFailed, match="artifact against PyTorch: features"):
        export(segmenter(), backend="onnx", output=tmp_path / "b.dvx", **SEGMENTER)


def test_verify_reads_the_limits_of_the_bundle(tmp_path):
    bundle = bundle_of("segmenter")
    strict = bundle.manifest.model_copy(update={"limits": Limits(outputs={"masks": 0.0})})
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    report = verify(write_bundle(tmp_path / "strict.dvx", strict, files))
    assert {row.name for row in report.rows if not row.ok} >= {"golden data: masks"}
    assert all(row.ok for row in report.rows if row.name.endswith("features"))


def test_an_error_is_measured_by_the_spread_of_its_output():
    want = [Step({"boxes": np.array([100.0, 300.0], np.float32), "score": np.array([0.5, 0.7], np.float32)})]
    got = [Step({"boxes": np.array([101.0, 300.0], np.float32), "score": np.array([0.5, 0.71], np.float32)})]
    assert output_error("boxes", got, want) == pytest.approx(1 / 200)
    assert output_error("score", got, want) == pytest.approx(0.01 / 0.2, rel=1e-4)
    flat = [Step({"x": np.full(4, 1000.0, np.float32)})]
    assert output_error("x", [Step({"x": np.full(4, 1000.01, np.float32)})], flat) == pytest.approx(1e-3, rel=1e-2)
    whole = [Step({"x": np.array([1, 2, 3, 4])})]
    assert output_error("x", [Step({"x": np.array([1, 2, 3, 9])})], whole) == 0.25
    assert output_error("x", [Step({"y": np.zeros(4)})], whole) == np.inf
    assert [row.ok for row in compare("a", got, want, Limits(outputs={"boxes": 0.01}))] == [True, False]


class Plain(nn.Module):
    """Gives whatever a function makes of the frames."""

    def __init__(self, make) -> None:
        super().__init__()
        self.conv, self.make = nn.Conv2d(3, 4, 3, padding=1), make

    def forward(self, frames):
        return self.make(self.conv(frames))


class Pair(NamedTuple):
    near: torch.Tensor
    far: torch.Tensor


@pytest.mark.parametrize(
    ("make", "told", "names"),
    [
        (lambda x: x, {}, ["output"]),
        (lambda x: x.mean((2, 3)), {"labels": list("abcd")}, ["logits"]),
        (lambda x: Pair(x, x + 1), {}, ["near", "far"]),
        (lambda x: {"b": x, "a": x.mean((2, 3))}, {}, ["b", "a"]),
        (lambda x: (x, x.argmax(1)), {"outputs": ["scores_map", "best"]}, ["scores_map", "best"]),
    ],
)
def test_names_come_from_what_forward_returns(make, told, names, tmp_path):
    example, path = torch.zeros(2, 3, *SIZE), tmp_path / "a.dvx"
    bundle = export(Plain(make).eval(), backend="onnx", output=path, example=example, preprocess=PREPROCESS, **told)
    assert [output.name for output in bundle.manifest.declared_outputs] == names
    (step,) = open_session(bundle).run_clip(np.ones((1, 3, *SIZE), np.float32))
    assert list(step.outputs) == names


class Starred(nn.Module):
    def forward(self, *frames):
        return frames[0]


class Lazy(nn.Module):
    def forward(self, frames, flow):
        return frames


@pytest.mark.parametrize(
    ("model", "told", "error", "says"),
    [
        (Plain(lambda x: x.mean(0)), {}, TraceError, "an output lacks the frame axis"),
        (Plain(lambda x: x.sum()), {}, TraceError, "an output lacks the frame axis"),
        (Plain(lambda x: (x, x)), {"outputs": ["a", "a"]}, UsageError, "two inputs or outputs are called 'a'"),
        (Plain(lambda x: {"frames": x}), {}, UsageError, "two inputs or outputs are called 'frames'"),
        (Plain(lambda x: (x, x)), {}, TraceError, "gives 2 outputs, and 0 are named"),
        (Plain(lambda x: {"a": [x]}), {}, TraceError, "an output is no tensor"),
        (Plain(lambda x: {}), {}, TraceError, "the model gives no outputs"),
        (Plain(lambda x: {"a": x[:, :0]}), {}, TraceError, "an output holds nothing"),
        (Plain(lambda x: x.double()), {}, TraceError, "an output is torch.float64"),
        (Plain(lambda x: x), {"outputs": [Output("m", "map", ("a", "b"))]}, UsageError, "2 labels for an output of 4"),
        (Plain(lambda x: x), {"outputs": [Output("m", "boxes")]}, UsageError, "of kind 'boxes' is"),
        (Plain(lambda x: x), {"labels": ["a"]}, UsageError, "labels name the classes of one output"),
        (Plain(lambda x: {"a": x}), {"outputs": ["b"]}, UsageError, "gives no output 'b'"),
        (Plain(lambda x: {"forced_x": x}), {}, UsageError, "'forced_x' can't name"),
        (Plain(lambda x: x), {"preprocess": None}, UsageError, "nothing tells how the model's frames"),
        (Plain(lambda x: x), {"preprocess": imagenet_preprocess((9, 9), 3)}, UsageError, "do not fit the input"),
        (Plain(lambda x: x), {"example": torch.zeros(2, 3, *SIZE).long()}, UsageError, "must be float32, not"),
        (Plain(lambda x: x), {"example": None}, UsageError, "described by an example"),
        (Plain(lambda x: x), {"example": {"clip": torch.zeros(2, 3, *SIZE)}}, UsageError, "no input 'clip'"),
        (Plain(lambda x: x), {"example": torch.zeros(2, 5, *SIZE)}, UsageError, "first input must be the video"),
        (Starred(), {}, UsageError, r"forward takes \*frames"),
        (Lazy(), {}, UsageError, "the example lacks the input 'flow'"),
    ],
)  # fmt: skip
def test_what_no_bundle_can_hold_is_one_error(model, told, error, says, tmp_path):
    path = tmp_path / "a.dvx"
    with pytest.raises(error, match=says):
        export(
            model.eval(),
            backend="onnx",
            output=path,
            **{"example": torch.zeros(2, 3, *SIZE), "preprocess": PREPROCESS, **told},
        )
    assert not path.exists()


def test_a_module_without_a_description_is_told_how_to_give_one(tmp_path):
    with pytest.raises(UsageError, match="nothing tells what a Segmenter takes"):
        export(segmenter(), backend="onnx", output=tmp_path / "a.dvx")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda feeds: feeds.pop("flow"), "the input 'flow' is missing"),
        (lambda feeds: feeds.update(depth=feeds["flow"]), "there is no input 'depth'"),
        (lambda feeds: feeds.update(flow=feeds["flow"][:, :1]), r"'flow' must be float32 of shape \[1, 2, 24, 32\]"),
        (lambda feeds: feeds.update(flow=feeds["flow"].astype(int)), "'flow' must be float32"),
        (lambda feeds: feeds.update(flow=feeds["flow"] * np.nan), "'flow' has NaN"),
        (lambda feeds: feeds.update(flow=np.repeat(feeds["flow"], 2, 0)), "'flow' must be float32 of shape"),
    ],
)
def test_wrong_inputs_are_named(change, says):
    feeds = clip_feeds(flow=True, frames=1)
    change(feeds)
    with open_session(bundle_of("detector")) as session, pytest.raises(UsageError, match=says):
        session.step(feeds)


def test_inputs_of_a_clip_have_the_same_number_of_frames():
    feeds = clip_feeds(flow=True)
    feeds["flow"] = feeds["flow"][:2]
    with open_session(bundle_of("detector")) as session, pytest.raises(UsageError, match="same number of frames"):
        session.run_clip(feeds)


def test_the_logits_of_a_model_without_any_are_an_error():
    with open_session(bundle_of("segmenter")) as session:
        step = session.step(clip_feeds(flow=False, frames=1))
    with pytest.raises(UsageError, match="gives no logits"):
        _ = step.logits


def test_a_bundle_of_format_1_still_opens_runs_and_is_verified(tmp_path):
    bundle = small_bundle("tsn_resnet18", "stream")
    members = {name: bundle.read(name) for name in bundle.manifest.files}
    raw = json.loads(bundle.manifest.to_json())
    raw["format"] = 1
    del raw["limits"]
    for entry in raw["outputs"]:
        del entry["kind"], entry["labels"]
    old = write_bundle(tmp_path / "old.dvx", parse_manifest(json.dumps(raw).encode(), where="here"), members)
    opened = Bundle.open(old.path)
    assert opened.manifest.format == 1
    assert opened.manifest.declared_outputs == (Output("logits", "logits", tuple(bundle.manifest.labels)),)
    report = verify(opened, model=small_model("tsn_resnet18"))
    assert report.ok and {row.limit for row in report.rows if row.name == "PyTorch: logits"} == {1e-3}


@pytest.mark.parametrize(("transform", "fits"), [("half_pixel", True), ("half_pixel_symmetric", False)])
def test_a_resize_is_written_in_an_older_opset_where_it_means_the_same(transform, fits):
    graph = f'''<ir_version: 10, opset_import: ["" : 20]>
    g (float[1, 1, 4, 4] x) => (float[1, 1, 8, 8] y) <float[4] scales = {{1.0, 1.0, 2.0, 2.0}}>
    {{ y = Resize<mode = "linear", coordinate_transformation_mode = "{transform}">(x, , scales) }}'''
    model = ir.from_proto(onnx.parser.parse_model(graph))
    if fits:
        assert onnx.load_from_string(emit(model, opset=18)).opset_import[0].version == 18
    else:
        with pytest.raises(UsageError, match="can't be written in opset 18"):
            emit(model, opset=18)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m["outputs"][1].update(labels=["a"]), "output 'features': an output of kind 'array' has no labels"),
        (lambda m: m["outputs"][0].update(labels=["a"]), "output 'masks': 1 labels for an output of 3 channels"),
        (lambda m: m["outputs"][1].update(kind="boxes"), "output 'features': an output of kind 'boxes' is"),
        (lambda m: m["outputs"][0].update(kind="logits", labels=[]), "output 'masks': an output of kind 'logits' is"),
        (lambda m: m["outputs"][1].update(name="masks"), "two inputs or outputs are called 'masks'"),
        (lambda m: m.update(outputs=m["outputs"][2:]), "no output is the model's own"),
        (lambda m: m["limits"]["outputs"].update(nothing=0.1), "a limit is of 'nothing'"),
    ],
)
def test_a_manifest_whose_outputs_do_not_fit_is_a_bundle_error(change, why):
    manifest = json.loads(bundle_of("segmenter").manifest.to_json())
    change(manifest)
    with pytest.raises(BundleError, match=why):
        parse_manifest(json.dumps(manifest).encode(), where="here")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("frames", lambda a: a[:-1]),
        ("frames", lambda a: a[:0]),
        ("frames", lambda a: a.astype(np.float64)),
        ("frames", lambda a: a[:, :1]),
        ("frames", lambda a: a * np.nan),
        ("masks", lambda a: a[:, :1]),
        ("masks", lambda a: a.astype(np.int64)),
        ("features", lambda a: np.concatenate([a, a])),
        ("force.decoder.tiles", lambda a: None),
        ("force.decoder.tiles", lambda a: a[..., :1]),
    ],
)
def test_golden_data_of_another_form_is_a_bundle_error(tmp_path, name, change):
    bundle = bundle_of("segmenter")
    golden = dict(bundle.golden())
    changed = change(golden.pop(name))
    golden |= {} if changed is None else {name: np.ascontiguousarray(changed)}
    files = {one: bundle.read(one) for one in bundle.manifest.files} | {GOLDEN: save(golden)}
    with pytest.raises(BundleError, match="the golden data is"):
        verify(write_bundle(tmp_path / "x.dvx", bundle.manifest, files))


def test_an_npz_with_a_damaged_header_is_a_usage_error(tmp_path):
    np.savez(tmp_path / "a.npz", flow=np.zeros(3))
    data = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(data.replace(b"'descr'", b"((((((("))
    with pytest.raises(UsageError, match="the inputs can't be read"):
        read_arrays(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("kind", "field", "value", "why"),
    [
        ("inputs", "shape", [1, 3, 8, 8], "float32 [1, 3, 8, 8], the artifact float32"),
        ("inputs", "dtype", "float16", "float16"),
        ("outputs", "name", "other", "the artifact none"),
        ("outputs", "dtype", "int64", "int64"),
    ],
)
def test_an_artifact_that_is_not_what_the_manifest_says_is_not_opened(tmp_path, kind, field, value, why):
    bundle = bundle_of("detector")
    told = json.loads(bundle.manifest.to_json())
    told[kind][0][field] = value
    if field == "name":
        told["limits"]["outputs"] = {value: 1e-3}
    content = {name: bundle.read(name) for name in bundle.manifest.files}
    altered = write_bundle(tmp_path / "x.dvx", parse_manifest(json.dumps(told).encode(), where="x"), content)
    with pytest.raises(BundleError, match="the artifact has another") as caught:
        open_session(altered)
    assert why in caught.value.why


def test_a_model_that_gives_no_numbers_is_told_so(tmp_path):
    class Lost(nn.Module):
        def forward(self, frames):
            return {"y": frames.mean((1, 2, 3)) / 0 * 0}

    with pytest.raises(TraceError, match="the model itself gives numbers that are not finite") as caught:
        export(
            Lost(), example=torch.zeros(2, 3, *SIZE), preprocess=PREPROCESS, backend="onnx", output=tmp_path / "x.dvx"
        )
    assert "frame 0" in caught.value.why
