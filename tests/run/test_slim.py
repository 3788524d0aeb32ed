"""Slim bundles, compared with the whole ones that they were made of; and bundles unpacked into folders."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import onnxruntime as ort
import pytest
from bundles import noise, small_bundle

from dvexport.bundle.archive import GOLDEN, MANIFEST, Bundle, write_bundle
from dvexport.bundle.slim import slim
from dvexport.bundle.unpack import unpack
from dvexport.cli import main
from dvexport.errors import BundleError, CheckFailed, UsageError
from dvexport.run.open import open_session
from dvexport.targets.registry import backend_of
from dvexport.verify import verify

DSTEP = "dstep_resnet18"


@pytest.fixture(scope="module")
def whole() -> Bundle:
    return small_bundle(DSTEP, "stream")


@pytest.fixture(scope="module")
def small(whole, tmp_path_factory) -> Bundle:
    return slim(whole, tmp_path_factory.mktemp("slim") / "slim.dvx", backend_of("onnx").needed(whole))


def logits(bundle: Bundle) -> np.ndarray:
    with open_session(bundle) as session:
        return np.stack([step.logits for step in session.run_clip(noise())])


def test_a_slim_bundle_runs_as_the_whole_one_does(whole, small):
    np.testing.assert_array_equal(logits(small), logits(whole))
    assert small.path.stat().st_size < 0.8 * whole.path.stat().st_size
    assert set(small.manifest.files) == {"model.onnx", "weights.bin"}
    assert small.manifest.left_out.keys() == {"gate_level.onnx", GOLDEN, "weights.bin"}
    golden = hashlib.sha256(whole.read(GOLDEN)).hexdigest()
    assert Bundle.open(small.path).manifest.left_out[GOLDEN].sha256 == golden


def test_what_was_left_out_is_told(small):
    for use in (lambda: verify(small), lambda: open_session(small, variant="dense"), small.golden):
        with pytest.raises(BundleError, match=r"the bundle is slim: '.*' was left out"):
            use()


def test_a_slim_bundle_is_verified_by_the_whole_one(whole, small):
    assert verify(small, whole=whole).ok


def test_another_whole_bundle_is_refused(whole, small, tmp_path):
    with pytest.raises(CheckFailed, match="not made of this whole one") as caught:
        verify(small, whole=small_bundle("tsm_resnet18", "clip"))
    assert MANIFEST in caught.value.why
    files = {name: whole.read(name) for name in whole.manifest.files}
    weights = bytearray(files["weights.bin"])
    weights[8] ^= 1
    altered = write_bundle(tmp_path / "x.dvx", whole.manifest, {**files, "weights.bin": bytes(weights)})
    with pytest.raises(CheckFailed, match=r"they differ in weights\.bin"):
        verify(small, whole=altered)


def test_whole_and_slim_are_told_apart(whole, small, tmp_path):
    with pytest.raises(UsageError, match="the bundle is whole itself"):
        verify(whole, whole=small)
    with pytest.raises(UsageError, match="what is given as the whole bundle is slim"):
        verify(small, whole=small)
    with pytest.raises(UsageError, match="slim already"):
        slim(small, tmp_path / "again.dvx", {})


def test_slim_and_unpack_at_the_command_line(whole, tmp_path, capsys):
    made, folder = tmp_path / "slim.dvx", tmp_path / "files"
    for command in (["slim", whole.path, "-o", made], ["verify", made, "--whole", whole.path], ["inspect", made]):
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in command])
        assert left.value.code == 0
    assert "left out    gate_level.onnx, golden.safetensors, weights.bin (slim)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["unpack", str(made), "-o", str(folder)])
    assert "next: onnxruntime.InferenceSession opens model.onnx" in capsys.readouterr().out
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].name == "frames"


def test_an_unpacked_bundle_has_every_byte_of_it(whole, tmp_path):
    paths = unpack(whole, tmp_path / "files")
    assert {str(path.relative_to(tmp_path / "files")) for path in paths} == {*whole.manifest.files, MANIFEST}
    for name in whole.manifest.files:
        assert (tmp_path / "files" / name).read_bytes() == whole.read(name)
    (tmp_path / "empty").mkdir()
    assert unpack(whole, tmp_path / "empty")


def test_a_folder_with_files_is_left_alone(whole, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for place in (tmp_path, tmp_path / "mine", tmp_path / "no" / "parent"):
        with pytest.raises(UsageError, match="cannot write"):
            unpack(whole, place)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_bundle_that_changes_meanwhile_leaves_nothing(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(Bundle, "array", lambda *_: (_ for _ in ()).throw(BundleError("altered")))
    with pytest.raises(BundleError):
        unpack(whole, tmp_path / "files")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", [".onnx", ".ONNX", ".tflite", ".so"])
def test_a_file_of_the_model_alone_is_no_output(suffix, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["export", DSTEP, "--backend", "onnx", "-o", str(tmp_path / f"x{suffix}")])
    text = capsys.readouterr().err
    assert left.value.code == 2
    assert f"an export is a bundle, not a {suffix} file" in text
    assert f"try: -o {tmp_path / 'x.dvx'}; then dvexport unpack {tmp_path / 'x.dvx'} -o FOLDER" in text
