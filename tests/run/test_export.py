"""Exports: what a bundle holds, that it is reproducible, and every request that is refused."""

from __future__ import annotations

import hashlib
import os
import sys

import numpy as np
import onnx
import pytest
import torch
from bundles import FRAMES, SIZE, inlined, small_bundle, small_model, torch_logits

import dvexport
import dvexport.export
from dvexport.bundle.archive import Bundle
from dvexport.bundle.graphs import read_model
from dvexport.bundle.levels import read_gate_level
from dvexport.dialect.flops import FlopTable
from dvexport.errors import CheckFailed, CheckpointError, ClipError, DeviceError, UntoldError, UsageError
from dvexport.graph import onnx_file
from dvexport.models import zoo
from dvexport.models.checkpoints.checkpoint import save_checkpoint
from dvexport.run import golden
from dvexport.run.calibrate import gate_rates, gate_statistics
from dvexport.run.session import Step
from dvexport.targets.onnx import passes
from dvexport.targets.onnx.emit import emit
from dvexport.targets.onnx.runtime import OrtSession
from dvexport.video.clips import write_clip

TINY = {"width": "0.125", "size": "32", "frames": "3", "classes": "4"}


@pytest.fixture(scope="module")
def stream():
    return small_bundle("dstep_resnet18", "stream")


@pytest.fixture
def dstep_again(stream, monkeypatch):
    """Return a function that exports the D-STEP model once more, without the seconds of tracing it."""
    module = sys.modules["dvexport.export"]
    monkeypatch.setattr(module, "trace", lambda _model, _size: read_gate_level(stream))

    def export(output, **options):
        return dvexport.export(small_model("dstep_resnet18"), output=output, **{"backend": "onnx", **options})

    return export


def _export(output, model="tsn_resnet18", **options):
    options = {"backend": "onnx", "settings": TINY, **options}
    return dvexport.export(model, output=output, **options)


def test_the_manifest_tells_what_was_exported(stream):
    manifest = stream.manifest
    assert (manifest.model.name, manifest.backend, manifest.mode) == ("dstep_resnet18", "onnx", "stream")
    assert manifest.inputs[0].shape == (1, 3, SIZE, SIZE)
    assert manifest.outputs[0].name == "logits"
    assert manifest.outputs[0].shape == (1, 12)
    assert manifest.labels == small_model("dstep_resnet18").labels
    assert [gate.name for gate in manifest.gates] == [f"layer{s}.{b}" for s in range(1, 5) for b in range(2)]
    gate = manifest.gates[2]
    assert (gate.kind, gate.channels, gate.grid) == ("channels+tiles", 32, (2, 2))
    assert gate.reason
    assert {"consensus.sum", "consensus.count", "layer1.0.policy"} <= {state.name for state in manifest.states}
    assert {record.name for record in manifest.passes} >= {"SetStream", "ChooseLowering", "LowerMasked"}
    assert manifest.tools["onnxruntime"]


def test_the_flop_table_counts_the_network(stream):
    """Against the sizes of the layers, written out: stem, four stages of two blocks, head."""
    table = FlopTable.from_dict(stream.manifest.flops)
    widths, sizes = (16, 32, 64, 128), (16, 8, 4, 2)
    assert table.dense_of("layer1.0") == 2 * 9 * 16 * 16 * 16 * 16
    blocks = sum(
        9 * size * size * width * (before + 3 * width)
        for before, width, size in zip((16, *widths), widths, sizes, strict=False)
    )
    downsamples = sum(a * b * s * s for a, b, s in zip(widths, widths[1:], sizes[1:], strict=False))
    assert table.dense == 3 * 49 * 16 * 32 * 32 + blocks + downsamples + 128 * 12


def test_the_golden_data_is_pytorchs(stream):
    frames, steps = golden.unpack(stream.golden())
    model = small_model("dstep_resnet18")
    np.testing.assert_array_equal(np.stack([step.logits for step in steps]), torch_logits(model, frames["frames"]))
    for decision in model.decisions():
        got = np.stack([step.decisions[decision.gate, "action"] for step in steps])
        np.testing.assert_array_equal(got, decision.action)
    assert len(frames["frames"]) == FRAMES


def test_the_golden_frames_are_a_picture_that_moves():
    frames = golden.moving_texture(small_model("tsn_resnet18").preprocess, FRAMES)
    assert frames.shape == (FRAMES, 3, SIZE, SIZE)
    assert frames.dtype == np.float32
    assert frames.std() > 0.5
    assert all(np.abs(frames[t + 1] - frames[t]).mean() > 0.05 for t in range(FRAMES - 1))


def test_the_artifact_is_standard_onnx_at_the_targets_opset(stream):
    model = onnx.load_from_string(inlined(stream))
    onnx.checker.check_model(model, full_check=True)
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 18)}
    assert {node.domain for node in model.graph.node} == {""}


def test_no_path_of_the_exporting_machine_is_in_a_bundle(stream):
    content = stream.path.read_bytes()
    home = os.path.dirname(os.path.dirname(dvexport.__file__)).encode()
    assert home not in content
    assert b"stack_trace" not in content


def test_the_same_export_gives_the_same_bytes(tmp_path):
    digests = set()
    for name in ("a.dvx", "b.dvx"):
        bundle = _export(tmp_path / name, "adafuse_resnet18", settings={**TINY, "enabled_stages": "3"})
        digests.add(hashlib.sha256(bundle.path.read_bytes()).hexdigest())
    assert len(digests) == 1
    assert bundle.manifest.checkpoint is None  # name and settings alone rebuild it


def test_a_checkpoint_is_named_by_its_digest(tmp_path):
    model = small_model("tsn_resnet18")
    path = tmp_path / "weights.safetensors"
    settings = {"width": 0.25, "size": (SIZE, SIZE), "frames": FRAMES, "classes": 12}
    save_checkpoint(path, model, architecture="tsn_resnet18")
    steps = []
    bundle = _export(tmp_path / "c.dvx", settings=settings, checkpoint=path, mode="clip", progress=steps.append)
    assert bundle.manifest.checkpoint == hashlib.sha256(path.read_bytes()).hexdigest()
    assert bundle.manifest.model.settings["size"] == [SIZE, SIZE]
    assert steps == ["load the model", "trace", "lower the gates", "compare with PyTorch", "write the bundle"]
    report = dvexport.verify(bundle, checkpoint=path)
    assert report.ok
    assert any(row.name == "PyTorch: logits" for row in report.rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tvm", "lowering": {"*": "tiles"}}, "backend 'tvm' takes no lowerings"),
        ({"backend": "tflite"}, "backend 'tflite' is not in this release"),
        ({"backend": "onix"}, "did you mean onnx"),
        ({"mode": "steam"}, "did you mean stream"),
        ({"target": "raspberry-pi-44"}, "did you mean raspberry-pi-4"),
        ({"model": "tsn_resnet1"}, "did you mean tsn_resnet18"),
        ({"settings": {"widht": "1"}}, "did you mean width"),
        ({"lowering": {"*": "maskd"}}, "did you mean masked"),
    ],
)
def test_wrong_requests_are_refused_at_once(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        _export(tmp_path / "x.dvx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_clip_that_cant_be_read_is_told_before_the_trace(tmp_path):
    steps = []
    with pytest.raises(ClipError, match="no such video"):
        _export(tmp_path / "x.dvx", calibrate=tmp_path / "missing.mp4", progress=steps.append)
    assert steps == ["load the model"]


def test_an_output_that_cant_be_written_is_told_before_the_work(tmp_path):
    steps = []
    with pytest.raises(UsageError, match="does not exist"):
        _export(tmp_path / "missing" / "x.dvx", progress=steps.append)
    assert steps == []


def test_a_gate_or_lowering_that_does_not_exist_is_refused(tmp_path, dstep_again):
    with pytest.raises(UsageError, match=r"did you mean layer1\.0"):
        dstep_again(tmp_path / "x.dvx", lowering={"layer1.00": "masked"})
    with pytest.raises(UsageError, match="did you mean tiles"):
        dstep_again(tmp_path / "x.dvx", lowering={"layer1.0": "tile"})
    assert list(tmp_path.iterdir()) == []


def test_what_an_official_checkpoint_does_not_tell_is_in_the_manifest(tmp_path):
    torch.save(small_model("tsn_resnet18").state_dict(), tmp_path / "c.pth")
    request = {"settings": {"size": (SIZE, SIZE)}, "checkpoint": tmp_path / "c.pth", "mode": "clip"}
    with pytest.raises(UntoldError, match="nothing in the checkpoint tells frames, and the numbers depend on it"):
        _export(tmp_path / "c.dvx", **request)
    assert not (tmp_path / "c.dvx").exists()
    bundle = _export(tmp_path / "c.dvx", **request, assume_defaults=True)
    assert bundle.manifest.model.assumed == {"frames": 8}
    assert bundle.manifest.model.inferred["width"] == 0.25


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = zoo.create("tsn_resnet18", **TINY)
    with torch.no_grad():
        model.fc.bias[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"fc\.bias"):
        dvexport.export(model, backend="onnx", output=tmp_path / "x.dvx")


def test_a_plain_module_needs_an_example(tmp_path):
    with pytest.raises(UsageError, match="nothing tells what a Linear takes"):
        dvexport.export(torch.nn.Linear(3, 4), backend="onnx", output=tmp_path / "x.dvx")


def test_a_lowering_can_be_overruled_gate_by_gate(tmp_path, dstep_again):
    gates = dstep_again(tmp_path / "x.dvx", lowering={"*": "masked", "layer4.1": "tiles"}).manifest.gates
    assert [gate.lowering for gate in gates] == ["masked"] * 7 + ["tiles"]
    assert all(gate.overridden for gate in gates)


def test_a_calibration_clip_sets_the_expected_rates(tmp_path, dstep_again, monkeypatch):
    write_clip(tmp_path / "clip.mp4", np.random.default_rng(0).integers(0, 255, (8, 80, 80, 3), np.uint8), 8)
    plans, lower = [], passes.lower
    monkeypatch.setattr(passes, "lower", lambda traced, plan: plans.append(plan) or lower(traced, plan))
    dstep_again(tmp_path / "x.dvx", calibrate=tmp_path / "clip.mp4")
    (plan,) = plans
    assert len(plan.rates) == 8
    assert plan.statistics["layer1.0"].actions.shape == (FRAMES, 16)
    assert {0 < rates.compute <= 1 for rates in plan.rates.values()} == {True}


def test_an_artifact_that_is_off_is_not_written(tmp_path, dstep_again, monkeypatch):
    run = OrtSession.run

    def off(self, feeds):
        outputs = run(self, feeds)
        return {**outputs, "logits": outputs["logits"] * np.float32(1.01)}

    monkeypatch.setattr(OrtSession, "run", off)
    with pytest.raises(CheckFailed, match=r"at most 0\.001 is allowed") as caught:
        dstep_again(tmp_path / "x.dvx")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_decision_that_flips_is_named_by_gate_and_frame(tmp_path, dstep_again, monkeypatch):
    run = OrtSession.run

    def flipped(self, feeds):
        outputs = run(self, feeds)
        if "probe.layer3.0.action" in outputs:
            outputs["probe.layer3.0.action"][:, 1] += 1
        return outputs

    monkeypatch.setattr(OrtSession, "run", flipped)
    with pytest.raises(CheckFailed, match=r"gate 'layer3\.0', frame 0: 1 of 64 channels"):
        dstep_again(tmp_path / "x.dvx")


def test_a_model_above_two_gib_is_refused(stream, monkeypatch):
    monkeypatch.setattr(onnx_file, "MAX_BYTES", 1 << 20)
    with pytest.raises(UsageError, match="ends at 2 GiB"):
        emit(read_model(stream, "model.onnx"))


def test_a_file_that_is_no_model_is_a_device_error():
    with pytest.raises(DeviceError, match="can't load the model"):
        OrtSession(b"no model at all")


def test_rates_count_what_the_next_frame_reuses():
    keep_then_reuse = [np.array([2, 0, 0, 0]), np.array([1, 1, 0, 2])]
    tiles = [np.array([[True, False]]), np.array([[True, True]])]
    steps = [
        Step(np.zeros(1), {("g", "action"): a, ("g", "tiles"): t}) for a, t in zip(keep_then_reuse, tiles, strict=True)
    ]
    rates = gate_rates(steps)["g"]
    assert rates.tiles == 3 / 4
    assert rates.compute == (2 + 1) / 8  # frame 0: its own channel 0 and channel 1 for frame 1
    assert rates.active == (1 + 3) / 8
    np.testing.assert_array_equal(gate_statistics(steps)["g"].actions, np.stack(keep_then_reuse))


def test_the_package_offers_its_verbs_whatever_was_imported_before():
    import dvexport.verify  # the module of the same name must not hide the function

    assert callable(dvexport.verify)
    assert callable(dvexport.export)
    assert dvexport.Bundle is Bundle
    with pytest.raises(AttributeError, match="nothing"):
        _ = dvexport.nothing
