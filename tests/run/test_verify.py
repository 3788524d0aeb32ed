"""Verification: bundles that are right pass, and one altered in any of its parts does not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from bundles import FRAMES, inlined, noise, small_bundle, small_model
from onnx import numpy_helper
from safetensors.numpy import save

from dvexport.bundle.archive import Bundle, write_bundle
from dvexport.bundle.limits import Limits
from dvexport.cli import main
from dvexport.errors import BundleError, UsageError
from dvexport.run.compare import compare, first_difference, output_error
from dvexport.run.forced import unpack as unpack_forced
from dvexport.run.golden import pack
from dvexport.run.run import run
from dvexport.run.session import Step
from dvexport.verify import verify
from dvexport.video.clips import write_clip

DSTEP = "dstep_resnet18"


@pytest.fixture(scope="module")
def stream():
    return small_bundle(DSTEP, "stream")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "noise.mp4"
    frames = np.random.default_rng(3).integers(0, 255, (12, 10, 10, 3), np.uint8)
    write_clip(path, frames.repeat(8, 1).repeat(8, 2), 12.0)
    return path


def _changed(bundle: Bundle, path, **files: bytes) -> Bundle:
    """The same bundle with other content, correctly listed: its digests hold."""
    content = {name: bundle.read(name) for name in bundle.manifest.files}
    return write_bundle(path, bundle.manifest, {**content, **{k.replace("__", "."): v for k, v in files.items()}})


def _with_weight_changed(data: bytes, name: str, factor: float) -> bytes:
    model = onnx.load_from_string(data)
    (weight,) = (w for w in model.graph.initializer if w.name == name)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), name))
    return model.SerializeToString()


@pytest.mark.parametrize("mode", ["stream", "clip"])
def test_a_bundle_as_exported_passes(mode):
    report = verify(small_bundle(DSTEP, mode))
    assert report.ok
    assert report.difference is None
    names = [row.name for row in report.rows]
    other = "clip" if mode == "stream" else "stream"
    decisions = FRAMES * sum(
        value.numel() for d in small_model(DSTEP).decisions() for value in (d.action[0], d.tiles[0])
    )
    assert names == [
        "golden data: logits",
        f"golden data: decisions that differ, of {decisions}",
        "gate-level oracle: logits",
        f"gate-level oracle: decisions that differ, of {decisions}",
        "again after a reset: logits",
        "forced decisions, gate-level oracle: logits",
        "forced decisions, golden data: logits",
        f"{mode} against {other}: logits",
    ]
    assert report.notes == ("not compared with PyTorch: give --checkpoint",)


def test_a_clip_of_the_users_is_compared_too(stream, video):
    report = verify(stream, clip=video)
    assert report.ok
    assert 0 < next(row.value for row in report.rows if row.name == "gate-level oracle: logits") < 1e-3


def test_an_altered_weight_is_found(stream, tmp_path, capsys):
    artifact = _with_weight_changed(inlined(stream), "fc.weight", 1.5)
    bundle = _changed(stream, tmp_path / "x.dvx", model__onnx=artifact)
    report = verify(bundle)
    failed = {row.name for row in report.rows if not row.ok}
    assert failed == {
        "golden data: logits", "gate-level oracle: logits", "stream against clip: logits",
        "forced decisions, golden data: logits", "forced decisions, gate-level oracle: logits",
    }  # fmt: skip
    assert report.difference is None
    with pytest.raises(SystemExit) as left:
        main(["verify", str(bundle.path)])
    assert left.value.code == 1
    assert "FAILED" in capsys.readouterr().out


def test_an_altered_policy_is_named_by_gate_and_frame(stream, tmp_path):
    artifact = _with_weight_changed(inlined(stream), "layer2.0.gates.policy.fc1.bias.differences", -30.0)
    report = verify(_changed(stream, tmp_path / "x.dvx", model__onnx=artifact))
    assert not report.ok
    assert report.difference is not None
    assert (report.difference.gate, report.difference.frame) == ("layer2.0", 0)
    assert report.to_dict()["first_difference"]["gate"] == "layer2.0"


def test_an_altered_gate_level_model_is_found_by_what_it_is_the_witness_of(stream, tmp_path):
    gate_level = _with_weight_changed(inlined(stream, "gate_level.onnx"), "fc.weight", 1.5)
    report = verify(_changed(stream, tmp_path / "x.dvx", gate_level__onnx=gate_level))
    failed = {row.name for row in report.rows if not row.ok}
    forced = "forced decisions, gate-level oracle: logits"
    assert failed == {"gate-level oracle: logits", "stream against clip: logits", forced}


def test_a_part_that_is_missing_or_unreadable_is_a_bundle_error(stream, tmp_path):
    with pytest.raises(BundleError, match="a graph of the bundle can't be read"):
        verify(_changed(stream, tmp_path / "x.dvx", gate_level__onnx=b"\xff\xff no model"))
    other = pack(noise(), [Step(np.zeros(12, np.float32))] * FRAMES, unpack_forced(stream.golden(), where="here"))
    assert not verify(_changed(stream, tmp_path / "y.dvx", golden__safetensors=other)).ok
    files = {name: stream.read(name) for name in stream.manifest.files if name != "gate_level.onnx"}
    with pytest.raises(BundleError, match=r"no file 'gate_level\.onnx'"):
        verify(write_bundle(tmp_path / "z.dvx", stream.manifest, files))


@pytest.mark.parametrize(
    "arrays",
    [
        {"frames": noise()},
        {"frames": noise(), "logits": np.zeros((0, 12), np.float32)},
        {"frames": noise(), "logits": np.float32(1)},
        {"frames": noise()[0], "logits": np.zeros((FRAMES, 12), np.float32)},
        {"frames": noise(), "logits": np.zeros((2, 12), np.float32), "probe.g.tiles": np.zeros((1, 2), bool)},
    ],
)
def test_golden_data_that_is_none_is_a_bundle_error(stream, tmp_path, arrays):
    golden = save({name: np.asarray(array) for name, array in arrays.items()})
    with pytest.raises(BundleError, match="golden data is incomplete"):
        verify(_changed(stream, tmp_path / "x.dvx", golden__safetensors=golden))


def test_another_checkpoint_is_refused(stream, tmp_path):
    path = tmp_path / "other.pth"
    path.write_bytes(b"other weights")
    with pytest.raises(UsageError, match="not the checkpoint that the bundle was made from"):
        verify(stream, checkpoint=path)


def _steps(logits, decisions):
    return [Step(np.array(row), {("g", "action"): np.array(d)}) for row, d in zip(logits, decisions, strict=True)]


def test_errors_are_relative_to_the_spread():
    want = _steps([[1.0, -200.0], [3.0, 4.0]], [[0], [0]])
    got = _steps([[1.0, -200.0], [3.1, 4.0]], [[0], [0]])
    assert output_error("logits", got, want) == pytest.approx(0.1 / 204)


def test_results_of_another_shape_fail():
    want = _steps([[1.0, 2.0]] * 2, [[0, 0]] * 2)
    assert output_error("logits", _steps([[1.0]] * 2, [[0, 0]] * 2), want) == np.inf
    assert not compare("x", _steps([[1.0, 2.0]], [[0, 0]]), want, Limits())[0].ok
    assert first_difference(_steps([[1.0, 2.0]] * 2, [[0]] * 2), want).count == 1


def test_an_error_that_is_no_number_fails():
    want = _steps([[1.0]], [[0]])
    assert not compare("x", _steps([[np.nan]], [[0]]), want, Limits())[0].ok


def test_one_decision_in_ten_thousand_may_fall_the_other_way():
    want = _steps([[1.0]] * 2, [np.zeros(5000, int)] * 2)
    one, two = np.zeros(5000, int), np.zeros(5000, int)
    one[7], two[:2] = 1, 1
    assert compare("x", _steps([[1.0]] * 2, [want[0].decisions["g", "action"], one]), want, Limits())[1].ok
    assert not compare("x", _steps([[1.0]] * 2, [two, one]), want, Limits())[1].ok
    found = first_difference(_steps([[1.0]] * 2, [want[0].decisions["g", "action"], one]), want)
    assert str(found) == "gate 'g', frame 1: 1 of 5000 channels decided otherwise"


def test_run_ranks_the_classes(stream, video):
    result = run(stream, video)
    assert len(result.frames) == 12
    assert len(result.top) == 5
    chances = [probability for _, probability in result.top]
    assert chances == sorted(chances, reverse=True)
    assert 0 < sum(chances) <= 1
    assert result.top[0] == (result.frames[-1].label, pytest.approx(result.frames[-1].probability))
    assert result.frames[3].time == pytest.approx(3 / 12)
    assert result.to_dict()["top"][0]["label"] in stream.manifest.labels


def test_run_samples_a_clip_in_clip_mode(video):
    assert len(run(small_bundle(DSTEP, "clip"), video).frames) == FRAMES
