"""Video-Swin with token pruning as a bundle, on both backends: from a file of the official layout to its profile."""

from __future__ import annotations

import json

import numpy as np
import official_layouts as official
import onnx
import pytest
import torch
from click.testing import CliRunner
from sample_transformers import small_swin

from dvexport.bundle.archive import Bundle
from dvexport.bundle.levels import DENSE_LEVEL, GATE_LEVEL, read_level
from dvexport.cli import cli
from dvexport.graph.weights import WEIGHTS
from dvexport.run.open import open_session
from dvexport.targets.tvm.native_files import NATIVE_WEIGHTS

pytestmark = pytest.mark.slow

OPTIONS = {"embed_dim": 8, "depths": "2,2,1,1", "frames": 8, "size": 112, "window": "1,7,7"}
WINDOWS, CUTS, PLACES = 64, 4, 49
"""Stage 1 has 4 x 28 x 28 tokens in windows of 1 x 7 x 7, cut by the shift in 4 ways."""

STAGES = [(4, 132, 196, (4, 14, 14)), (4, 33, 49, (4, 7, 7)), (4, 17, 33, (4, 7, 7)), (4, 8, 16, (4, 4, 4))]
"""Groups, tokens that each keeps of how many, and the grid that they lie on: stage 2, stage 3 twice, stage 4."""


def call(*arguments):
    result = CliRunner().invoke(cli, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = small_swin(**{key: str(value) for key, value in OPTIONS.items()}).float()
    path = tmp_path_factory.mktemp("swin") / "swin.pth"
    return official.save(path, official.swin_keys(model), wrapped="state_dict", meta={"epoch": 30})


@pytest.fixture(scope="module", params=["onnx", "tvm"])
def bundle(request, checkpoint, tmp_path_factory):
    if request.param == "tvm":
        pytest.importorskip("tvm", reason="needs the extra 'tvm'")
    path = tmp_path_factory.mktemp(request.param) / "swin.dvx"
    settings = [f"--set={key}={value}" for key, value in {**OPTIONS, "sta.r": 64}.items()]
    call("export", "video_swin_tiny", "--checkpoint", checkpoint, *settings, "--backend", request.param, "-o", path)
    return Bundle.open(path)


def test_verify(bundle, checkpoint):
    """Golden data, the oracle and PyTorch on the file's weights."""
    text = call("verify", bundle.path, "--checkpoint", checkpoint)
    assert "PyTorch: logits" in text and "tokens that differ" in text


def test_dense_variant_is_the_model_without_pruning(bundle):
    frames = bundle.golden()["frames"]
    (step,) = open_session(bundle, variant="dense").run_clip(frames)
    model = small_swin(**{key: str(value) for key, value in OPTIONS.items()}).float().eval()
    with torch.no_grad():
        wanted = model(torch.from_numpy(frames))[0].numpy()
    np.testing.assert_allclose(step.logits, wanted, atol=1e-4 * np.abs(wanted).max())


def test_forced_decisions_are_followed(bundle):
    """A path of its own through the native plans: a gather in place of each selection."""
    frames = bundle.golden()["frames"]
    (own,) = open_session(bundle).run_clip(frames)
    (step,) = open_session(bundle, variant="forced").run_clip(frames, [own.decisions])
    np.testing.assert_allclose(step.logits, own.logits, atol=1e-4 * np.abs(own.logits).max())


def test_profile_tells_what_choosing_takes(bundle, tmp_path):
    pages = ["--json", tmp_path / "profile.json", "--html", tmp_path / "page.html"]
    text = call("profile", bundle.path, "--runs", 2, *pages)
    assert "GMACs per clip" in text
    found = json.loads((tmp_path / "profile.json").read_text())
    whole = sum(node["median_us"] for node in found["nodes"]) / 1e3
    assert 0 < found["tokens_ms"] < whole
    stages = [(stage["groups"], stage["keep"], stage["tokens"], np.shape(stage["left"])) for stage in found["tokens"]]
    assert stages == STAGES
    assert (tmp_path / "page.html").read_text().count("% of its tokens left</title>") == 4 * len(STAGES)
    deciding = [node for node in found["nodes"] if node["gate"] == "tokens"]
    assert deciding and all(node["decides"] for node in deciding)


def test_masks_stand_once_for_all_windows_that_are_cut_alike(bundle):
    level = read_level(bundle, "dense")
    shapes = {tuple(value.shape) for value in level.graph.initializers.values()}
    assert (CUTS, 1, PLACES, PLACES) in shapes
    assert not any(shape[:2] == (WINDOWS, 1) and len(shape) == 4 for shape in shapes)


def test_weights_stand_once(bundle):
    """What the artifact holds as its kernels read it is not there again for the traced graphs."""
    sizes = {name: entry.size for name, entry in bundle.manifest.files.items()}
    parameters = sum(
        p.numel() * 4 for p in small_swin(**{key: str(v) for key, v in OPTIONS.items()}).float().parameters()
    )
    assert sizes.get(WEIGHTS, 0) < 2 * parameters
    if bundle.manifest.backend == "tvm":
        graph = onnx.load_model_from_string(bundle.read(GATE_LEVEL)).graph
        places = [{e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data]
        inside = [place for place in places if place["location"] == NATIVE_WEIGHTS]
        assert any("dvexport.panel" in place for place in inside) and any("dvexport.panel" not in p for p in inside)
        apart = sum(int(place["length"]) for place in places if place["location"] == WEIGHTS)
        assert apart < 0.3 * parameters, places
    assert {GATE_LEVEL, DENSE_LEVEL} <= set(sizes)
