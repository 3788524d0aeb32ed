"""Every command that works on a bundle, on a real one that `dvexport export` made."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load, save
from safetensors.torch import load_file

from dvexport.bundle.archive import GOLDEN, Bundle, write_bundle
from dvexport.models import figures as published
from dvexport.models.training.motion import SPLITS
from dvexport.run.run import run

TINY = """
name = "tiny"
model = "vit_small"
settings = { depth = 3, embed_dim = 8, heads = 2, patch = 8 }
[data]
size = 16
frames = 4
clips_per_epoch = 16
validation_clips = 12
[optimiser]
epochs = 2
batch = 16
"""


@pytest.fixture(scope="module")
def bundle(made) -> Bundle:
    return Bundle.open(made.path)


def test_export_hands_on_its_options(made, bundle, checkpoint):
    manifest, gates = bundle.manifest, bundle.manifest.gates
    assert (manifest.model.name, manifest.target, manifest.backend) == ("dstep_resnet18", "rk3588", "onnx")
    assert manifest.mode == "stream"
    given = {"classes": "12", "frames": "5", "shift": "none", "size": "64", "width": "0.25"}
    assert manifest.model.settings == given  # as written
    assert manifest.model.assumed.keys() == {"gate_pool", "gate_relu"}
    lowering = {gate.name: gate.lowering for gate in gates}
    assert lowering.pop("layer1.0") == "masked"
    assert "masked" not in lowering.values()
    lines = made.output.splitlines()
    assert lines[0].startswith(f"{made.path}: dstep_resnet18 for rk3588 (onnx, stream), ")
    assert "1 masked" in lines[1]
    assert lines[-1] == f"next: dvexport verify {made.path}"
    assert made.progress.splitlines()[0] == "load the model"


def test_export_leaves_nothing_behind_when_it_fails(call, checkpoint, tmp_path):
    whole, cut = checkpoint.read_bytes(), tmp_path / "cut.pth"
    cut.write_bytes(whole[: len(whole) // 2])
    code, out, err = call("export", "dstep_resnet18", "--checkpoint", cut, "-o", tmp_path / "o.dvx")
    assert (code, out) == (2, "")
    assert f"error: the checkpoint is truncated or damaged\n  where: {cut}" in err
    missing = ("--checkpoint", checkpoint, "--set=shift=none", "--assume-defaults", "--calibrate", tmp_path / "no.mp4")
    code, _, err = call("export", "dstep_resnet18", *missing, "-o", tmp_path / "o.dvx")
    assert (code, "trace" in err.splitlines()) == (2, False)
    assert "no such video" in err
    assert list(tmp_path.iterdir()) == [cut]


def test_export_takes_a_mode(call, tmp_path):
    tiny = [f"--set={pair}" for pair in ("depth=3", "embed_dim=24", "heads=3", "size=32", "frames=4")]
    code, out, err = call("export", "vit_small", *tiny, "--mode", "stream", "-o", tmp_path / "o.dvx")
    assert (code, out) == (2, "")
    assert "can't be exported in stream mode" in err and "--mode clip" in err
    assert list(tmp_path.iterdir()) == []


def test_inspect(call, made, bundle):
    code, out, _ = call("inspect", made.path)
    assert code == 0
    assert "given       classes=12 frames=5 shift=none size=64 width=0.25" in out
    assert "input       frames float32 1x3x64x64" in out
    (row,) = (line.split() for line in out.splitlines() if line.startswith("layer1.0 "))
    assert row[:5] == ["layer1.0", "channels+tiles", "16", "2x2", "masked"]
    code, out, _ = call("inspect", made.path, "--json")
    assert [gate["lowering"] for gate in json.loads(out)["gates"]] == [gate.lowering for gate in bundle.manifest.gates]


def test_verify(call, made, clip, checkpoint):
    code, out, err = call("verify", made.path, "--clip", clip, "--checkpoint", checkpoint)
    assert code == 0
    header, *rows = (line for line in out.partition("\n\n")[0].splitlines())
    assert header.split() == ["check", "value", "limit"]
    assert all(row.endswith(" ok") for row in rows)
    assert any(row.startswith("PyTorch: logits ") for row in rows)
    assert "never seen" in out and "layer4.1" in out
    assert err.splitlines() == ["check the bundle's files", "run the artifact and compare"]
    code, out, _ = call("verify", made.path, "--json")
    found = json.loads(out)
    assert found["ok"] is True and len(found["rows"]) < len(rows)  # nothing to build the model from
    _, clip_out, _ = call("verify", made.path, "--clip", clip, "--json")
    ours, on_clip = (
        [row["value"] for row in one["rows"] if row["name"].startswith("gate-level oracle: ")]
        for one in (found, json.loads(clip_out))
    )
    assert len(ours) == len(on_clip) == 2 and ours[0] != on_clip[0]


def test_a_failed_verify_exits_with_1(call, bundle, tmp_path):
    golden = load(bundle.read(GOLDEN))
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    files[GOLDEN] = save({**golden, "logits": golden["logits"] + np.float32(0.5)})
    write_bundle(tmp_path / "x.dvx", bundle.manifest, files)
    code, out, err = call("verify", tmp_path / "x.dvx")
    assert code == 1
    failed = [line for line in out.splitlines() if line.endswith(" FAILED")]
    assert [line.split("  ")[0] for line in failed] == ["golden data: logits"]
    count = sum(line.endswith((" ok", " FAILED")) for line in out.splitlines())
    assert f"error: 1 of {count} checks failed\n  where: golden data: logits" in err


def test_run(call, made, bundle, clip):
    expected = run(bundle, clip, 1).top
    code, out, _ = call("run", made.path, "--clip", clip, "--threads", "2")
    assert code == 0
    assert [line.split(maxsplit=1) for line in out.splitlines()] == [
        ["probability", "class"],
        *([f"{probability:.2%}", label] for label, probability in expected),
    ]
    code, out, _ = call("run", made.path, "--clip", clip, "--json")
    found = [(row["label"], row["probability"]) for row in json.loads(out)["top"]]
    assert found == [(label, pytest.approx(probability)) for label, probability in expected]


def test_profile_writes_what_was_asked_for(call, made, clip, tmp_path):
    files = {name: tmp_path / f"p.{name}" for name in ("json", "html", "trace")}
    code, out, err = call(
        *("profile", made.path, "--clip", clip, "--force", "tiles=0.5", "--runs", "2", "--warmup", "0"),
        *(part for name, path in files.items() for part in (f"--{name}", path)),
    )
    assert code == 0, err
    assert out.splitlines()[-3:] == [f"wrote {path}" for path in files.values()]
    assert "layer4.1" in out
    result = json.loads(files["json"].read_text())
    assert result["forced"] == {"tiles": 0.5}
    assert result["method"]["repeats"] == 2
    assert result["device"]["threads"] == 1
    assert {"forced", "other-processor"} & {advice["kind"] for advice in result["advice"]}
    page = files["html"].read_text()
    assert page.count("data:image/") > 1 and "<svg" in page
    assert len(result["steps"]) == 12
    assert {event["ph"] for event in json.loads(files["trace"].read_text())["traceEvents"]} >= {"X"}


def test_a_device_that_this_release_has_not(call, made):
    code, _, err = call("profile", made.path, "--device", "adb:123")
    assert code == 3
    assert "'adb:123' is not available in this release" in err
    assert "--device local" in err


def test_train(call, tmp_path, monkeypatch):
    monkeypatch.setitem(SPLITS, "validation", 12)
    recipe, output = tmp_path / "tiny.toml", tmp_path / "trained"
    recipe.write_text(TINY)
    code, out, err = call("train", recipe, "-o", output, "--epochs", "1", "--device", "cpu")
    assert code == 0, err
    assert len((output / "tiny.jsonl").read_text().splitlines()) == 1
    weights = load_file(output / "tiny.safetensors")
    code, _, _ = call("train", recipe, "-o", output, "--epochs", "1", "--device", "cpu", "--restart")
    assert code == 0
    again = load_file(output / "tiny.safetensors")
    assert all(np.array_equal(weights[name], again[name]) for name in weights)
    assert out


def test_figures_that_are_off_exit_with_1(call, monkeypatch):
    right = published.Figure("parameters", "M", 1.0, "1.0", "1.0", 1.0, None, "")
    assert right.ok
    monkeypatch.setattr(published, "figures", lambda: [right, dataclasses.replace(right, name="GMACs", value=2.0)])
    code, out, err = call("models", "--figures", "--json")
    assert code == 1
    assert [row["ok"] for row in json.loads(out)] == [True, False]
    assert "error: 1 of 2 figures are off\n  where: GMACs" in err
