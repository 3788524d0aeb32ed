"""Measured profiles: their figures follow from the decisions, and every node finds its gate."""

from __future__ import annotations

import json
import platform

import numpy as np
import onnx
import pytest
from bundles import FRAMES, SIZE, noise, small_bundle

from dvexport.dialect.flops import FlopTable
from dvexport.errors import ClipError, DeviceError, UsageError
from dvexport.profile import profile
from dvexport.profile.clip import load_clip
from dvexport.profile.environment import device_info
from dvexport.profile.measure import interleaved, random_decisions, warm_up
from dvexport.profile.report import render_html
from dvexport.profile.result import ProfileResult
from dvexport.run.open import open_session, variant_of
from dvexport.run.session import Step
from dvexport.targets.onnx.times import NodeProfile, Owner, child_scopes, gates_of_nodes, node_times
from dvexport.targets.times import typical, warmed
from dvexport.video.clips import write_clip

DSTEP, ADAFUSE = "dstep_resnet18", "adafuse_resnet18"
QUICK = {"runs": 3, "warmup_s": 0.0}


@pytest.fixture(scope="module")
def bundle():
    return small_bundle(DSTEP, "stream")


@pytest.fixture(scope="module")
def result(bundle):
    return profile(bundle, **QUICK)


@pytest.fixture(scope="module")
def forced(bundle):
    return profile(bundle, force={"channels": 0.5, "tiles": 0.25}, **QUICK)


def test_there_is_a_sample_for_every_frame_and_run_of_both(result):
    assert len(result.gated.samples_ms) == len(result.dense.samples_ms) == 3 * FRAMES
    assert min(result.gated.samples_ms) > 0
    assert [step.frame for step in result.steps] == list(range(FRAMES))
    frame_1 = result.gated.samples_ms[1::FRAMES]
    assert result.steps[1].latency_ms == pytest.approx(np.median(frame_1))


def test_the_flop_ratio_follows_from_the_decisions(bundle, result):
    """Eq. 2 once more by hand, for the gates' convolutions; the rest always runs."""
    table = FlopTable.from_dict(bundle.manifest.flops)
    session = open_session(bundle)
    steps = session.run_clip(bundle.golden()["frames"])
    executed = []
    for t, step in enumerate(steps):
        total = table.fixed + table.decisions
        for conv in table.gated:
            mask = step.decisions[conv.gate, "tiles"]
            action = step.decisions[conv.gate, "action"]
            full = np.kron(mask, np.ones((conv.size[0] // 2, conv.size[1] // 2), bool))
            if not conv.acts:
                total += (action != 0).sum() * conv.cout * 9 * full.sum()
                continue
            computed = np.where((action == 2)[:, None, None], full, False)
            if t:
                before = steps[t - 1].decisions
                old = np.kron(before[conv.gate, "tiles"], np.ones((conv.size[0] // 2, conv.size[1] // 2), bool))
                valid = (before[conv.gate, "action"] == 2)[:, None, None] & old
                computed = computed | ((action == 1)[:, None, None] & full & ~valid)
            total += computed.sum() * conv.cin * 9
        executed.append(int(total))
    assert [step.executed_macs for step in result.steps] == executed
    assert result.flop_ratio == pytest.approx(table.dense / np.mean(executed))
    assert result.realisation == pytest.approx(
        np.median(result.dense.samples_ms) / np.median(result.gated.samples_ms) / result.flop_ratio
    )


def test_gates_tell_their_decisions(bundle, result):
    steps = open_session(bundle).run_clip(bundle.golden()["frames"])
    for told, step in zip(result.steps, steps, strict=True):
        for gate, row in told.gates.items():
            action, tiles = step.decisions[gate, "action"], step.decisions[gate, "tiles"]
            assert (row.skip, row.reuse, row.compute) == tuple(int((action == a).sum()) for a in range(3))
            assert row.tile_mask == tiles.astype(int).tolist()
            assert (row.tiles_active, row.tiles_total) == (tiles.sum(), 4)


def test_forced_rates_are_met_exactly_on_every_frame(forced):
    assert forced.forced == {"channels": 0.5, "tiles": 0.25}
    for step in forced.steps:
        for gate in step.gates.values():
            assert gate.reuse == 0
            assert gate.compute == gate.skip == gate.channels // 2
            assert gate.tiles_active == 1
    masks = {str(step.gates["layer1.0"].tile_mask) for step in forced.steps}
    assert len(masks) > 1, "the decisions of every frame are drawn anew"


def test_forcing_one_kind_computes_the_other_everywhere(bundle):
    steps = profile(bundle, force={"tiles": 0.5}, runs=1, warmup_s=0.0).steps
    gates = [gate for step in steps for gate in step.gates.values()]
    assert all(gate.compute == gate.channels and gate.tiles_active == 2 for gate in gates)
    executed = {step.executed_macs for step in steps}
    assert len(executed) == 1


def test_every_gate_has_a_time_in_both_artifacts(result):
    for gate in result.gates:
        assert gate.median_ms > 0
        assert gate.dense_median_ms > 0
        assert gate.lowering
        assert gate.reason


def test_nodes_lie_within_a_step_and_know_their_gates(result):
    owners = {node.gate for node in result.nodes}
    assert owners == {None, *(gate.gate for gate in result.gates)}
    stem = [node for node in result.nodes if node.op in ("Conv", "FusedConv") and node.gate is None]
    assert stem, "the stem is outside of the gates"
    products = [node for node in result.nodes if node.op in ("Gemm", "FusedGemm")]
    assert sum(node.gate is not None for node in products) >= len(products) - 1  # all but the classifier
    policies = [node for node in products if node.role == "decide"]
    assert len(policies) == 2 * 8  # two linear layers in every block's policy
    assert all(node.start_us >= 0 and node.duration_us >= 0 for node in result.nodes)
    assert len(result.nodes) == len({node.node for node in result.nodes})


def test_the_downsample_of_a_block_is_none_of_its_gate(bundle):
    gates = [gate.name for gate in bundle.manifest.gates]
    dense = variant_of(bundle, "dense").model
    fixed = child_scopes(dense, gates)
    assert "layer2.0.downsample" in fixed
    assert not any(".gates" in scope for scope in fixed)
    owned = gates_of_nodes(dense, gates, fixed)
    convs = [node for node in onnx.load_from_string(dense).graph.node if node.op_type == "Conv"]
    gated = [node for node in convs if node.name in owned]
    assert len(convs) == 20  # stem, two in each of eight blocks, three downsamples
    assert len(gated) == 16


def test_the_result_survives_json_and_makes_a_page(bundle, result):
    assert ProfileResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    frames = load_clip(bundle, None).images
    assert frames.shape == (FRAMES, SIZE, SIZE, 3)
    assert "layer4.1" in render_html(result, frames)


@pytest.mark.slow
def test_clip_mode_is_measured_by_the_clip():
    result = profile(small_bundle(DSTEP, "clip"), **QUICK)
    assert len(result.gated.samples_ms) == 3
    assert sum(step.latency_ms for step in result.steps) == pytest.approx(result.gated.median)
    assert len(result.steps) == FRAMES


def test_a_model_without_tiles_or_gates_is_profiled_too():
    plain = profile(small_bundle("tsn_resnet18", "stream"), **QUICK)
    assert plain.gates == []
    assert plain.flop_ratio == 1.0
    with pytest.raises(UsageError, match="decides over no tiles"):
        profile(small_bundle("tsn_resnet18", "stream"), force={"tiles": 0.5})


def test_a_video_is_profiled_frame_by_frame(bundle, tmp_path):
    path = tmp_path / "c.mp4"
    write_clip(path, np.random.default_rng(0).integers(0, 255, (7, 80, 80, 3), np.uint8), 7.0)
    steps = []
    result = profile(bundle, clip=path, runs=1, warmup_s=0.0, progress=steps.append)
    assert (result.clip.name, result.clip.frames, result.clip.fps) == ("c.mp4", 7, 7.0)
    assert len(load_clip(bundle, path).images) == len(result.steps) == 7
    assert steps[0] == "read the clip"
    with pytest.raises(ClipError):
        profile(bundle, clip=tmp_path / "missing.mp4")


def test_golden_frames_are_shown_as_they_were(bundle):
    clip, preprocess = load_clip(bundle, None), bundle.manifest.preprocess
    again = (clip.images / 255 - preprocess.mean) / preprocess.std
    np.testing.assert_allclose(again.transpose(0, 3, 1, 2), clip.frames, atol=0.5 / 255 / 0.224 + 1e-3)


def test_wrong_requests_are_refused(bundle):
    with pytest.raises(DeviceError, match="not available"):
        profile(bundle, device="adb:1234")
    with pytest.raises(UsageError, match="did you mean tiles"):
        profile(bundle, force={"tile": 0.5})
    with pytest.raises(UsageError, match="from 0 to 1"):
        profile(bundle, force={"tiles": 1.5})
    with pytest.raises(UsageError, match="from 1 to 10000, not 0"):
        profile(bundle, runs=0)


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (0.3, 15), (1.0, 49)])
def test_random_tiles_have_the_rounded_count(rate, count):
    shapes = {("g", "tiles"): (7, 7), ("g", "action"): (64,)}
    drawn = random_decisions(shapes, {"tiles": rate}, 3)
    assert [int(d["g", "tiles"].sum()) for d in drawn] == [count] * 3
    assert all((d["g", "action"] == 2).all() for d in drawn)
    again = random_decisions(shapes, {"tiles": rate}, 3)
    assert all(np.array_equal(a["g", "tiles"], b["g", "tiles"]) for a, b in zip(drawn, again, strict=True))


class _Recorder:
    """A session that only notes who ran when."""

    mode = "stream"

    def __init__(self, name, log):
        self.name, self.log = name, log

    def reset(self):
        self.log.append((self.name, "reset"))

    def step(self, frame, forced=None):
        self.log.append((self.name, frame.item()))
        return Step(np.zeros(1), {}, seconds=0.001 if self.name == "gated" else 0.002)


def test_the_two_take_turns_and_take_turns_at_going_first():
    log = []
    frames = np.arange(2.0).reshape(2, 1)
    gated, dense = interleaved(_Recorder("gated", log), _Recorder("dense", log), frames, None, 2)
    order = [entry for entry in log if entry[1] != "reset"]
    assert order == [
        ("gated", 0), ("dense", 0), ("dense", 1), ("gated", 1),
        ("dense", 0), ("gated", 0), ("gated", 1), ("dense", 1),
    ]  # fmt: skip
    assert sum(entry[1] == "reset" for entry in log) == 4
    assert gated.samples_ms == [1.0] * 4
    np.testing.assert_array_equal(dense.frame_ms, np.full((2, 2), 2.0))


def test_warm_up_runs_both_at_least_once():
    log = []
    count = warm_up(_Recorder("a", log), _Recorder("b", log), np.zeros((2, 1)), None, 0.0)
    assert count == 1
    assert log == [("a", "reset"), ("a", 0), ("b", "reset"), ("b", 0)]


def test_node_times_are_medians_over_the_steps_after_the_warm_up():
    def run(ts, *nodes):
        events = [{"name": "model_run", "cat": "Session", "ts": ts, "dur": 100}]
        for name, op, start, dur in nodes:
            events.append(
                {"name": f"{name}_kernel_time", "cat": "Node", "ts": ts + start, "dur": dur, "args": {"op_name": op}}
            )
        return events

    events = run(0, ("conv", "Conv", 1, 999))
    for index, dur in enumerate((10, 30, 20)):
        branch = [("inner", "MatMul", 42, 5)] if index else []
        events += run(1000 * (index + 1), ("conv", "Conv", 1, dur), ("if", "If", 40, 50), *branch)
    nodes = [
        onnx.helper.make_node("Conv", ["x"], ["y"], name="conv"),
        onnx.helper.make_node("If", ["y"], ["z"], name="if"),
        onnx.helper.make_node("MatMul", ["z"], ["v"], name="inner"),
    ]
    graph = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []))
    times = node_times(NodeProfile(events, graph), dict.fromkeys(("y", "if", "inner"), Owner("gate")), passes=4)
    by_name = {node.node: node for node in times.nodes}
    assert by_name["conv"].median_us == 20
    assert by_name["conv"].start_us == 1
    assert by_name["inner"].median_us == 5  # not run in one of three steps
    assert times.gate_ms == {"gate": pytest.approx(0.025)}  # 10, 35, 25 without the enclosing If


def test_a_layout_change_belongs_to_what_needs_it():
    nodes = [
        onnx.helper.make_node("ReorderInput", ["x"], ["token"], name="ReorderInput_1"),
        onnx.helper.make_node("Conv", ["token"], ["other"], name="conv_value_nchwc"),
    ]
    graph = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []))
    events = [{"name": "model_run", "cat": "Session", "ts": 0, "dur": 9}]
    for index, node in enumerate(nodes):
        args = {"op_name": node.op_type}
        events.append({"name": f"{node.name}_kernel_time", "cat": "Node", "ts": index, "dur": 1, "args": args})
    times = node_times(NodeProfile(events, graph), {"conv_value": Owner("gate")}, passes=1)
    assert {node.node: node.gate for node in times.nodes} == {"ReorderInput_1": "gate", "conv_value_nchwc": "gate"}


def test_the_machine_is_described(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\nHardware : BCM2711\nModel : Raspberry Pi 4\n")
    for cpu, khz in ((0, 1500000), (1, 600000)):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text("ondemand\n")
        (folder / "scaling_cur_freq").write_text(f"{khz}\n")
    for zone, millidegrees in ((0, 48200), (1, 51000)):
        folder = tmp_path / f"sys/class/thermal/thermal_zone{zone}"
        folder.mkdir(parents=True)
        (folder / "temp").write_text(f"{millidegrees}\n")
    info = device_info(2, ("onnxruntime", "1.24.0"), "rv1126", root=tmp_path)
    assert (info.cpu, info.governor, info.threads) == ("Raspberry Pi 4", "ondemand", 2)
    assert (info.runtime, info.runtime_version) == ("onnxruntime", "1.24.0")
    assert info.frequencies_mhz == [1500.0, 600.0]
    assert info.temperature_c == 51.0
    assert info.is_target == platform.machine().startswith("armv7")


def test_what_the_machine_does_not_tell_is_unknown(tmp_path):
    info = device_info(1, ("onnxruntime", "1.24.0"), "my-board", root=tmp_path)
    assert info.cpu
    assert (info.governor, info.frequencies_mhz, info.temperature_c) == (None, None, None)
    assert info.is_target is None


def test_recording_does_not_change_results(bundle):
    from dvexport.run.open import open_variant

    session = open_variant(variant_of(bundle, "gated"), bundle.manifest, profile=True)
    recorded = session.run_clip(noise())
    plain = open_session(bundle).run_clip(noise())
    assert all(np.array_equal(a.logits, b.logits) for a, b in zip(recorded, plain, strict=True))
    assert any(event["name"] == "model_run" for event in session.runtime.end_profile().events)


def test_no_outlier_moves_the_time_of_a_gate():
    frames = np.array([1.0, 3.0])  # of unequal work
    passes = np.tile(frames, (5, 1))
    assert typical(passes.reshape(-1).tolist(), 5) == 2.0
    for place in range(10):
        times = passes.reshape(-1).copy()
        times[place] = 1e3
        assert typical(times.tolist(), 5) == 2.0
    assert (warmed(12, 6), warmed(3, 1)) == (2, 0)
