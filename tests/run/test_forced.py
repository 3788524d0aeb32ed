"""Steps with forced decisions exercise every gate, PyTorch follows them, and what is wrong in an idle gate is found.

The models are a stem, a gated residual block and a head, each with one thing that makes forcing it delicate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from bundles import inlined
from onnx import numpy_helper
from torch import Tensor, nn

from dvexport import gates
from dvexport.bundle.archive import GOLDEN, Bundle, write_bundle
from dvexport.bundle.limits import Limits
from dvexport.cli import main
from dvexport.errors import BundleError, CheckFailed, UsageError
from dvexport.export import export
from dvexport.models.base import VideoModel, imagenet_preprocess
from dvexport.passes.expose_probes import decision_values, forced_alone
from dvexport.passes.pipeline import Request
from dvexport.run.forced import STEPS, draw
from dvexport.run.forced_check import check_forced, references_of, verified_runs
from dvexport.run.forced_eager import forced_outputs
from dvexport.run.golden import moving_texture, pack, unpack
from dvexport.run.oracle import Oracle
from dvexport.run.possible import possible_actions
from dvexport.run.session import Session
from dvexport.targets import catalogue
from dvexport.targets.registry import backend_of
from dvexport.trace import trace
from dvexport.verify import verify

pytestmark = pytest.mark.slow

CHANNELS, GRID, SIZE, FRAMES = 24, 4, (32, 32), 4


@dataclass(frozen=True)
class Options:
    classes: int = 5


class Net(VideoModel):
    """A model with the gate `a`, and what `kind` says:

    `idle`: the mask is never active. `elsewhere`: the mask also dims the identity. `promise`: the second convolution
    is promised what the policy wants, not what the action says. `two`: the policy skips or computes, and the promise
    counts on it. `fixed`: the mask is a buffer. `mean`: the sum is divided by how many tiles are active. `before`: the
    mask and the policy are used before the gate takes them. `delayed`: those of the frame before are used. `constant`:
    the policy is a buffer.
    """

    def __init__(self, kind: str) -> None:
        labels = [f"class {i}" for i in range(Options.classes)]
        preprocess = imagenet_preprocess(SIZE, FRAMES)
        super().__init__(name=f"net_{kind}", config=Options(), preprocess=preprocess, labels=labels, causal=True)
        self.kind = kind
        self.stem = nn.Conv2d(3, CHANNELS, 3, 2, 1)
        self.conv1, self.conv2 = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.policy = nn.Linear(CHANNELS, CHANNELS * (2 if kind in ("promise", "two") else 3))
        self.mask = nn.Conv2d(CHANNELS, 1, 1)
        self.fc = nn.Linear(CHANNELS, Options.classes)
        self.register_buffer("roi", torch.arange(GRID * GRID).reshape(1, GRID, GRID) % 3 > 0)
        self.register_buffer("policy_of_all", torch.arange(CHANNELS) % 3)
        nn.init.constant_(self.mask.bias, -1e3 if kind == "idle" else 0.0)

    def decide(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The action, the tiles, and the promise of channels that may be other than zero."""
        scores = self.policy(x.mean((2, 3))).reshape(x.shape[0], CHANNELS, -1)
        index = scores.argmax(2)
        tiles = self.mask(F.avg_pool2d(x, 16 // GRID))[:, 0] >= 0
        if self.kind == "fixed":
            tiles = self.roi.expand(x.shape[0], -1, -1)
        if self.kind == "promise":
            keep = index == 1
            return torch.where(keep, gates.COMPUTE, gates.SKIP), tiles, keep
        if self.kind == "constant":
            index = self.policy_of_all.expand(x.shape[0], -1)
        action = index * 2 if self.kind == "two" else index
        return action, tiles, action == 2 if self.kind == "two" else action != 0

    def per_frame_logits(self, x: Tensor) -> Tensor:
        """Stem, block, mean."""
        x = F.relu(self.stem(x))
        action, tiles, active = self.decide(x)
        if self.kind == "before":
            x = x * gates.upsample_tiles(tiles.to(x.dtype), (16, 16)) + action.to(x.dtype).reshape(-1, CHANNELS, 1, 1)
        if self.kind == "delayed":
            before = gates.delay(tiles, name="tiles").to(x.dtype)
            x = x * (1 + gates.upsample_tiles(before, (16, 16)))
            x = x + gates.delay(action, name="action").to(x.dtype).reshape(-1, CHANNELS, 1, 1)
        u = gates.gated_conv(x, self.conv1, self.norm, gate="a", activation="relu", action=action, tiles=tiles)
        z = gates.gated_conv(u, self.conv2, gate="a", tiles=tiles, active_in=active)
        if self.kind == "elsewhere":
            x = x * (1 + gates.upsample_tiles(tiles.to(x.dtype), (16, 16)))
        if self.kind == "mean":
            z = z / tiles.to(z.dtype).sum((1, 2)).reshape(-1, 1, 1, 1)
        return self.fc((x + z).mean((2, 3)))


KINDS = ("idle", "elsewhere", "promise", "two", "fixed", "mean", "before", "delayed", "constant")


def net_of(kind: str) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Net(kind).eval()


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    """A model, traced, golden frames, and runs drawn for it."""
    net = net_of(request.param)
    traced, frames = trace(net, SIZE), moving_texture(net.preprocess, FRAMES)
    return net, traced, frames, draw(traced, Oracle(traced).run_clip(frames)[0].decisions, FRAMES, None)


def forced_session(traced: ir.Model, mode: str = "stream") -> Session:
    built = backend_of("onnx").build(traced, Request(mode=mode, frames=FRAMES), catalogue.load("host"), lambda _: None)
    return Session(built.forced().open(), mode=mode)


def test_artifact_oracle_and_pytorch_agree_on_what_is_forced(case):
    net, traced, frames, runs = case
    told, compared = verified_runs(forced_session(traced), traced, net, frames, runs, Limits())
    steps = sum(len(run) for run in compared)
    assert steps == (STEPS - 1 if net.kind == "mean" else STEPS)  # the last has no tile active: 0 / 0
    assert told[0].outputs["logits"].shape == (STEPS, Options.classes)
    found = check_forced(forced_session(traced), runs, frames, references_of(traced, frames, net), Limits())
    assert list(found.rows) == ["gate-level oracle", "PyTorch"]
    assert all(row.value < 1e-5 for rows in found.rows.values() for row in rows)
    assert found.left_out == STEPS - steps
    assert ("no finite result" in (found.note(found.rows) or "")) == (net.kind == "mean")


def test_decisions_are_forced_to_what_a_gate_can_decide(case):
    net, traced, _, runs = case
    given = runs[0].decisions
    actions = {int(action) for step in given for action in step["a", "action"]}
    assert actions == ({0, 2} if net.kind in ("promise", "two") else {0, 1, 2})
    assert possible_actions(decision_values(traced)["a", "action"]) == tuple(sorted(actions))
    active = [int(step["a", "tiles"].sum()) for step in given]
    assert active == [10] * STEPS if net.kind == "fixed" else {0, 8, GRID * GRID} == set(active)
    assert forced_alone(traced) == (net.kind != "promise")


def test_pytorch_follows_outside_of_gated_convolutions_too():
    net = net_of("elsewhere")
    frames = torch.from_numpy(moving_texture(net.preprocess, FRAMES))
    tiles = torch.arange(FRAMES * GRID * GRID).reshape(FRAMES, GRID, GRID) % 2 == 0
    with torch.no_grad():
        x = F.relu(net.stem(frames))
        action = net.decide(x)[0]
        u = gates.gated_conv(x, net.conv1, net.norm, gate="b", activation="relu", action=action, tiles=tiles)
        z = gates.gated_conv(u, net.conv2, gate="b", tiles=tiles)
        want = gates.frame_mean(net.fc((x * (1 + gates.upsample_tiles(tiles.float(), (16, 16))) + z).mean((2, 3))))
        found, unseen = forced_outputs(net, [frames], {("a", "tiles"): tiles})
        with gates.forced_decisions({("a", "tiles"): tiles}):
            convolutions_alone = net(frames)
    torch.testing.assert_close(found, want)
    assert not unseen
    assert (convolutions_alone - want).abs().max() > 1e-3


def test_pytorch_follows_what_is_written_in_place():
    class Written(Net):
        def decide(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            action, tiles, _ = super().decide(x)
            action[:, 0] = gates.COMPUTE
            tiles[:, 0] = True
            return action, tiles, action != gates.SKIP

    net, plain = Written("elsewhere").eval(), net_of("elsewhere")
    net.load_state_dict(plain.state_dict())
    frames = torch.from_numpy(moving_texture(net.preprocess, FRAMES))
    tiles = torch.arange(FRAMES * GRID * GRID).reshape(FRAMES, GRID, GRID) % 2 == 0
    given = {("a", "tiles"): tiles, ("a", "action"): torch.full((FRAMES, CHANNELS), gates.REUSE)}
    torch.testing.assert_close(forced_outputs(net, [frames], given)[0], forced_outputs(plain, [frames], given)[0])


def test_a_decision_that_no_call_is_seen_to_make_is_told():
    class Held(Net):
        """Its mask is an attribute."""

        def decide(self, x):
            action, _, active = super().decide(x)
            return action, self.held, active

    net, tiles = Held("elsewhere").eval(), torch.zeros(2, GRID, GRID, dtype=torch.bool)
    net.held = ~tiles
    given = {("a", "tiles"): tiles, ("a", "action"): torch.zeros(2, CHANNELS, dtype=torch.int64)}
    assert forced_outputs(net, [torch.zeros(2, 3, *SIZE)], given)[1] == {("a", "tiles")}


def _heavier(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Double the weights of the gated convolutions, which only active tiles read."""
    large = {name: 2 * array for name, array in weights.items() if array.size >= CHANNELS * CHANNELS * 9}
    assert large
    return {**weights, **large}


@pytest.fixture(scope="module")
def idle(tmp_path_factory) -> Bundle:
    return export(net_of("idle"), backend="onnx", output=tmp_path_factory.mktemp("idle") / "idle.dvx")


def _with(bundle: Bundle, path, manifest=None, **files: bytes) -> Bundle:
    content = {name: files.get(name.partition(".")[0], bundle.read(name)) for name in bundle.manifest.files}
    return write_bundle(path, manifest or bundle.manifest, content)


def test_a_wrong_idle_gate_is_refused_by_export_and_named(tmp_path, monkeypatch):
    from dvexport.targets.onnx import emit as backend

    emit = backend.emit_apart

    def emit_heavier(*args, **options):
        text, weights = emit(*args, **options)
        return text, _heavier(weights)

    monkeypatch.setattr(backend, "emit_apart", emit_heavier)
    with pytest.raises(CheckFailed, match="gate 'a'") as caught:
        export(net_of("idle"), backend="onnx", output=tmp_path / "x.dvx")
    assert "forced decisions, gate-level oracle: logits" in str(caught.value.why)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_idle_gate_fails_verify(idle, tmp_path):
    artifact = onnx.load_model_from_string(inlined(idle))
    heavier = _heavier({one.name: numpy_helper.to_array(one) for one in artifact.graph.initializer})
    for one in artifact.graph.initializer:
        one.CopyFrom(numpy_helper.from_array(heavier[one.name], one.name))
    report = verify(_with(idle, tmp_path / "x.dvx", model=artifact.SerializeToString()))
    assert {row.name for row in report.rows if not row.ok} == {
        "forced decisions, gate-level oracle: logits",
        "forced decisions, golden data: logits",
    }


def test_what_was_seen_of_each_gate_is_told(idle, capsys):
    with pytest.raises(SystemExit):
        main(["inspect", str(idle.path)])
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("a  "))
    assert row[5] == "-"  # nothing was never seen
    (gate,) = idle.manifest.gates
    assert (gate.seen.clip.no_tiles, gate.seen.clip.computed, gate.seen.clip.reused) == (FRAMES, 0, 0)
    assert gate.seen.forced.model_dump() == {
        "frames": 8, "computed": 4, "reused": 5, "skipped": 5, "stale": 3, "no_tiles": 1, "some_tiles": 3,
        "all_tiles": 4, "new_tiles": 3, "chosen": 0,
    }  # fmt: skip
    with pytest.raises(SystemExit) as left:
        main(["verify", str(idle.path)])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert [line.split() for line in printed.splitlines() if line.startswith("a ")] == [
        ["a", "0+4", "0+5", f"{gate.seen.clip.skipped}+5", "0+3", "4+1", "0+3", "0+4", "0+3", "-"]
    ]


def test_a_bundle_without_forced_steps_verifies_and_says_so(idle, tmp_path):
    frames, steps = unpack(idle.golden())
    gates_before = [gate.model_copy(update={"seen": None}) for gate in idle.manifest.gates]
    before = idle.manifest.model_copy(update={"gates": gates_before})
    old = _with(idle, tmp_path / "old.dvx", before, golden=pack(frames, steps))
    report = verify(old)
    assert report.ok
    assert "no gate was exercised by forced decisions" in " ".join(report.notes)
    assert report.gates[0].missing == ["computed", "reused", "stale", "some_tiles", "all_tiles", "new_tiles"]
    with pytest.raises(BundleError, match="golden data is incomplete"):  # its manifest says that there were some
        verify(_with(idle, tmp_path / "stripped.dvx", golden=pack(frames, steps)))


@pytest.mark.parametrize("change", ["missing", "shape", "value", "frame"])
def test_damaged_forced_steps_are_a_bundle_error(idle, tmp_path, change):
    from safetensors.numpy import save

    golden = idle.golden()
    if change == "missing":
        del golden["forced_logits"]
    elif change == "shape":
        golden["force.a.action"] = golden["force.a.action"][..., :-1].copy()
    elif change == "value":
        golden["force.a.action"][0, 0, 0] = 3
    else:
        golden["forced_frames"][0, 0] = FRAMES
    with pytest.raises(BundleError, match="golden data is"):
        verify(_with(idle, tmp_path / "x.dvx", golden=save(golden)))
    assert GOLDEN in idle.manifest.files


def test_clips_are_run_as_often_as_it_takes():
    net = net_of("idle")
    traced = trace(net, SIZE)
    own = Oracle(traced).run_clip(moving_texture(net.preprocess, 2))[0].decisions
    for length, count in ((1, 8), (3, 3), (8, 1), (12, 1)):
        runs = draw(traced, own, FRAMES, length)
        assert [len(run.decisions) for run in runs] == [length] * count
        assert all(run.frames.max() < FRAMES for run in runs)
    session = forced_session(traced, "clip")
    frames, runs = moving_texture(net.preprocess, FRAMES), draw(traced, own, FRAMES, FRAMES)
    told, compared = verified_runs(session, traced, net, frames, runs, Limits())
    assert [run.outputs["logits"].shape for run in told] == [(FRAMES, Options.classes)] * 2
    assert sum(map(len, compared)) == STEPS


def test_what_single_frames_cant_show_is_told(tmp_path):
    net = net_of("idle")
    net.preprocess = imagenet_preprocess(SIZE, 1)
    (gate,) = verify(export(net, backend="onnx", output=tmp_path / "x.dvx", mode="clip")).gates
    assert gate.seen.forced.frames == STEPS
    assert gate.missing == ["stale", "new_tiles"]


def test_a_promise_about_a_decision_is_not_held_against_a_forced_one():
    conv = nn.Conv2d(3, 3, 1)
    nn.init.ones_(conv.weight)
    promise = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(UsageError, match="active_in promises"):
        gates.gated_conv(torch.ones(1, 3, 2, 2), conv, gate="b", active_in=promise)
    with gates.forced_decisions({("a", "action"): torch.full((1, 3), 2)}):
        gates.gated_conv(torch.ones(1, 3, 2, 2), conv, gate="b", active_in=promise)
