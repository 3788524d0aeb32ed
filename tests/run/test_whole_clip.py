"""A model that reads clips as one and chooses tokens, from trace to report."""

from __future__ import annotations

import copy
import json
import os
import sys
import zipfile

import numpy as np
import onnx
import pytest
import torch
from fvcore_flops import operator_flops
from sample_profile import result_table
from toy_transformer import Toy, ToyConfig, toy

from dvexport import gates
from dvexport.bundle.archive import Bundle
from dvexport.bundle.levels import DENSE_LEVEL, GATE_LEVEL, read_level
from dvexport.bundle.limits import Limits
from dvexport.dialect.flops import flop_table
from dvexport.errors import CheckFailed, ClipError, TraceError, UsageError
from dvexport.export import export
from dvexport.graph.weights import WEIGHTS
from dvexport.models.base import VideoModel, imagenet_preprocess
from dvexport.passes.pipeline import Request
from dvexport.profile import profile
from dvexport.profile.clip import load_clip
from dvexport.profile.report import render_html
from dvexport.profile.report_text import headline
from dvexport.profile.result import ProfileResult
from dvexport.run.compare import decision_rows
from dvexport.run.golden import moving_texture, torch_steps
from dvexport.run.open import open_session
from dvexport.run.run import run
from dvexport.run.session import Step
from dvexport.targets.onnx.passes import lower
from dvexport.tokens import survivors
from dvexport.trace import trace
from dvexport.verify import verify
from dvexport.video.clips import write_clip

pytestmark = pytest.mark.slow

CONFIG = ToyConfig()
TOKENS = 12  # in each of the two groups: 3 x 4 patches


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return export("toy_transformer:toy", backend="onnx", output=tmp_path_factory.mktemp("toy") / "toy.dvx")


@pytest.fixture(scope="module")
def frames(bundle) -> np.ndarray:
    return bundle.golden()["frames"]


def seeded(**settings) -> Toy:
    torch.manual_seed(0)
    return toy(**settings).eval()


def test_numbers_and_decisions_are_pytorchs(bundle, frames):
    report = verify(bundle, model="toy_transformer:toy")
    assert report.ok, report
    assert {row.name.split(":")[0] for row in report.rows} >= {"golden data", "gate-level oracle", "PyTorch"}
    assert sum("tokens that differ, of 30" in row.name for row in report.rows) == 3
    assert report.notes == ("no stream to compare with: the model reads a clip as one",)
    with torch.random.fork_rng(), gates.token_decisions() as chosen, torch.no_grad():
        torch.manual_seed(0)
        logits = toy().eval()(torch.from_numpy(frames))
    (step,) = open_session(bundle).run_clip(frames)
    np.testing.assert_allclose(step.logits, logits[0], atol=1e-5)
    for gate, index in chosen.items():
        np.testing.assert_array_equal(step.decisions[gate, "tokens"], index[0])
    assert {gate: value.shape for (gate, _), value in step.decisions.items()} == {
        "sta.0.0": (9,), "sta.0.1": (9,), "sta.1.0": (6,), "sta.1.1": (6,),
    }  # fmt: skip


def test_whole_clips_export_as_clips(bundle):
    assert bundle.manifest.mode == "clip"
    assert {output.name: output.shape[0] for output in bundle.manifest.outputs}["logits"] == 1


def test_the_dense_variant_prunes_nothing(bundle, frames):
    (dense,) = open_session(bundle, variant="dense").run_clip(frames)
    (wanted,) = torch_steps(seeded(drop=0), frames)
    np.testing.assert_allclose(dense.logits, wanted.logits, atol=1e-5)
    assert not dense.decisions


def test_the_forced_variant_follows(bundle, frames):
    """Other tokens, other logits: those that PyTorch gives for the same tokens."""
    session = open_session(bundle, variant="forced")
    rng = np.random.default_rng(3)
    sizes = {"sta.0.0": 12, "sta.0.1": 12, "sta.1.0": 9, "sta.1.1": 9}
    given = {(gate, "tokens"): rng.permutation(size)[: size - 3].astype(np.int64) for gate, size in sizes.items()}
    (step,) = session.run_clip(frames, [given])
    (wanted,) = torch_steps(seeded(), frames, follow=[Step(step.logits, given)])
    (own,) = open_session(bundle).run_clip(frames)
    np.testing.assert_allclose(step.logits, wanted.logits, atol=1e-5)
    assert np.abs(step.logits - own.logits).max() > 1e-3
    with pytest.raises(UsageError, match="2 decisions were given for one clip"):
        session.run_clip(frames, [given, given])


def test_stream_mode_is_refused(tmp_path):
    with pytest.raises(UsageError, match="can't be exported in stream mode") as error:
        export("toy_transformer:toy", backend="onnx", output=tmp_path / "toy.dvx", mode="stream")
    assert "--mode clip" in str(error.value.hint) and not list(tmp_path.iterdir())
    with pytest.raises(TraceError, match="it reads a clip as one"):
        lower(trace(seeded(), CONFIG.size), Request(mode="stream"))


def test_other_clip_lengths_are_refused(bundle, frames):
    with pytest.raises(UsageError, match=r"the input must be float32 of shape \[4, 3, 48, 64\]"):
        open_session(bundle).run_clip(frames[:3])
    with pytest.raises(UsageError, match="reads a clip of 4 frames as one, not of 8"):
        lower(trace(seeded(), CONFIG.size), Request(mode="clip", frames=8))
    with pytest.raises(UsageError, match="a clip-mode bundle runs whole clips"):
        open_session(bundle).step(frames[:1])


def test_a_model_without_a_dense_version_is_refused(tmp_path):
    class Bare(VideoModel):
        def __init__(self):
            preprocess = imagenet_preprocess(CONFIG.size, 4)
            super().__init__(
                name="bare", config=CONFIG, preprocess=preprocess, labels=[], causal=False, whole_clip=True
            )
            self.head = torch.nn.Linear(3, 5)

        def forward(self, frames):
            x = frames.mean((2, 3))[None]
            kept, _ = gates.select_tokens(x, x.sum(2), 2, gate="half")
            return self.head(kept.mean(1))

    with pytest.raises(TraceError, match="offers no dense version"):
        export(Bare(), backend="onnx", output=tmp_path / "bare.dvx", mode="clip")
    assert not list(tmp_path.iterdir())


def test_whole_clips_are_not_causal():
    with pytest.raises(ValueError, match="not causal"):
        VideoModel(name="x", config=None, preprocess=None, labels=[], causal=True, whole_clip=True)


@pytest.mark.parametrize("variant", ["gated", "masked", "dense"])
def test_passes_keep_the_graph_legal(variant):
    model = seeded(drop=0) if variant == "dense" else seeded()
    lowered = lower(trace(model, CONFIG.size), Request(mode="clip", frames=4, variant=variant), check=True)
    assert not [node for node in lowered.model.graph if node.domain == "dv"]


def test_weights_stand_in_a_bundle_once(bundle):
    with zipfile.ZipFile(bundle.path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    parameters = sum(p.numel() * 4 for p in seeded().parameters())
    assert {WEIGHTS, GATE_LEVEL, DENSE_LEVEL, "model.onnx"} <= set(sizes)
    assert 0.9 * parameters < sizes[WEIGHTS] < 1.1 * parameters + 16 * 32 * 32 * 4  # the scores' own transposes
    assert max(sizes[name] for name in (GATE_LEVEL, DENSE_LEVEL, "model.onnx")) < 0.2 * parameters
    data = bundle.path.read_bytes()
    places = [data.index(bundle.array(WEIGHTS).tobytes()) % 64]  # for whoever maps a bundle
    for name in ("model.onnx", GATE_LEVEL):
        graph = onnx.load_model_from_string(bundle.read(name))
        outside = [t for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert len(outside) > 10
        places += [int(entry.value) % 64 for t in outside for entry in t.external_data if entry.key == "offset"]
    assert not any(places)


def test_a_bundle_cut_short_under_an_open_session_changes_nothing(bundle, tmp_path):
    """Weights that graphs refer to are what ONNX Runtime computes with in place."""
    frames, copy = bundle.golden()["frames"], tmp_path / "copy.dvx"
    copy.write_bytes(bundle.path.read_bytes())
    with open_session(Bundle.open(copy)) as session:
        os.truncate(copy, 0)
        (step,) = session.run_clip(frames)
    with open_session(bundle) as session:
        np.testing.assert_array_equal(step.logits, session.run_clip(frames)[0].logits)


def test_exports_are_the_same_to_the_byte(bundle, tmp_path):
    again = export("toy_transformer:toy", backend="onnx", output=tmp_path / "again.dvx", mode="clip")
    assert again.path.read_bytes() == bundle.path.read_bytes()


def test_macs_are_those_of_the_graph(bundle):
    """Counted by hand: n tokens after each block's pruning; the scores' products are decisions."""
    c, patch = CONFIG.width, 3 * 2 * CONFIG.patch**2
    counts = [24, 18, 12]

    def blocks(tokens):
        return sum(12 * n * c * c + 2 * n * n * c for n in tokens)

    table = flop_table(read_level(bundle, "gated"), read_level(bundle, "dense"))
    rest = 24 * patch * c + c * CONFIG.classes
    assert table.fixed == rest + blocks(counts)
    assert table.dense == rest + blocks([24, 24, 24])
    assert table.decisions == (24 + 18) * c * 4 * c
    assert bundle.manifest.flops == table.to_dict() | {"gated": []}
    norms = 5 * c * (2 * sum(counts) + 1)
    assert operator_flops(read_level(bundle, "gated")) == table.fixed + table.decisions + norms


def test_survivors():
    decisions = {("a", "tokens"): np.array([2, 0]), ("b", "tokens"): np.array([1, 3]), ("c", "tokens"): np.array([3])}
    first, second = survivors((2, 2, 2), [["a", "b"], ["c"]], decisions)
    np.testing.assert_array_equal(np.flatnonzero(first), [0, 2, 5, 7])
    np.testing.assert_array_equal(np.flatnonzero(second), [7])
    _, merged = survivors((2, 2, 2), [["a", "b"], ["c"]], decisions, [None, (2, 1, 2)])
    np.testing.assert_array_equal(np.argwhere(merged), [[1, 0, 1]])
    with pytest.raises(UsageError, match="outside its group"):
        survivors((2, 2, 1), [["a", "b"]], decisions)
    with pytest.raises(UsageError, match="divided into 2 groups"):
        survivors((1, 3, 1), [["a", "b"]], decisions)


def test_profile_and_page(bundle, tmp_path):
    result = profile(bundle, runs=2, warmup_s=0.0)
    assert result.flop_ratio == pytest.approx(bundle.manifest.flops["unpruned"] / result.steps[0].executed_macs)
    assert [(stage.name, stage.groups, stage.tokens, stage.keep) for stage in result.tokens] == [
        ("sta.0", 2, 12, 9), ("sta.1", 2, 9, 6),
    ]  # fmt: skip
    deciding = [node for node in result.nodes if node.gate == "tokens"]
    assert {"TopK", "Gather", "Abs", "ReduceSum"} <= {node.op for node in deciding}
    attention = [node for node in result.nodes if node.op == "Softmax" and node.gate is None]
    assert attention and {node.role for node in attention} == {"compute"}
    assert all(node.decides for node in deciding) and not {"LayerNormalization", "Gelu"} & {n.op for n in deciding}
    assert result.tokens_ms is not None and 0 < result.tokens_ms < sum(node.median_us for node in result.nodes) / 1e3
    assert [np.asarray(stage.left).sum() for stage in result.tokens] == [18, 12]
    assert np.asarray(result.tokens[0].left).shape == (2, 3, 4)
    assert ProfileResult.from_dict(json.loads(json.dumps(result.to_dict()))).tokens == result.tokens
    stages = [line.split() for line in result_table(result).splitlines() if line.startswith("sta.")]
    assert stages == [["sta.0", "2", "24", "18", "25%"], ["sta.1", "2", "18", "12", "33%"]]
    assert "choosing them takes" in result_table(result) and "FLOP  reali-" not in result_table(result)
    page = render_html(result, load_clip(bundle, None).images)
    assert "each keeps 9 of 12 tokens" in page and page.count("% of its tokens left") == 2 * 4
    assert "each keeps 6 of 9 tokens" in render_html(result)


def test_a_profile_without_pruning_counts_clips_too(tmp_path):
    """Whether a step is a frame or a clip depends on the model, not on whether it chooses tokens."""
    plain = export("test_whole_clip:unpruned", backend="onnx", output=tmp_path / "plain.dvx")
    result = profile(plain, runs=2, warmup_s=0.0)
    assert (result.unit, len(result.steps), result.tokens) == ("clip", 1, [])
    assert ProfileResult.from_dict(json.loads(json.dumps(result.to_dict()))).unit == "clip"
    text = headline(result)
    assert "1 clip," in text and "GMACs per clip" in text and "frame" not in text.replace("golden frames", "")
    page = render_html(result, load_clip(plain, None).images)
    assert "GMACs per clip" in page and "Median of each frame" not in page


def unpruned() -> Toy:
    return toy(drop=0)


def test_forced_profile(bundle):
    result = profile(bundle, runs=1, warmup_s=0.0, force={"tokens": 1.0})
    assert [np.asarray(stage.left).sum() for stage in result.tokens] == [18, 12]
    with pytest.raises(UsageError, match=r"tokens can't be forced at a rate of 0\.5"):
        profile(bundle, force={"tokens": 0.5})


def test_run_a_video(bundle, tmp_path):
    write_clip(tmp_path / "clip.mp4", np.random.default_rng(0).integers(0, 255, (9, 64, 80, 3), np.uint8), 12.5)
    result = run(bundle, tmp_path / "clip.mp4")
    assert len(result.frames) == 1 and len(result.top) == 5
    assert sum(probability for _, probability in result.top) == pytest.approx(1)
    with pytest.raises(ClipError):
        run(bundle, tmp_path / "missing.mp4")


def test_too_many_other_tokens_fail():
    """A swap passes; an order of its own does not."""
    order = np.arange(40)
    swapped = order.copy()
    swapped[[3, 4]] = swapped[[4, 3]]

    def step(index):
        return [Step(np.zeros(2, np.float32), {("sta.0.0", "tokens"): index})]

    (row,) = decision_rows("x", step(swapped), step(order), Limits())
    assert row.ok and row.value == 2
    (row,) = decision_rows("x", step(order[::-1]), step(order), Limits())
    assert not row.ok


def test_an_artifact_that_chooses_otherwise_is_not_written(tmp_path, monkeypatch):
    """The scores are traced from one model and compared with another."""

    def wrong(net, size):
        other = copy.deepcopy(net)
        other.blocks[1].fc1.weight.data[:, 0] += 3
        return trace(other, size)

    monkeypatch.setattr(sys.modules["dvexport.export"], "trace", wrong)
    with pytest.raises(CheckFailed, match="does not compute what the model does"):
        export("toy_transformer:toy", backend="onnx", output=tmp_path / "toy.dvx", mode="clip")
    assert not list(tmp_path.iterdir())


def test_constant_clip(bundle):
    (step,) = open_session(bundle).run_clip(np.zeros((4, 3, 48, 64), np.float32))
    assert np.isfinite(step.logits).all()
    assert moving_texture(bundle.manifest.preprocess, 4).shape == (4, 3, 48, 64)


def test_inspect_tells_how_many_tokens_go_on(bundle):
    from click.testing import CliRunner

    from dvexport.cli import cli

    text = CliRunner().invoke(cli, ["inspect", str(bundle.path)]).output
    assert "9 of 12" in text and "6 of 9" in text and "top-k" in text
