"""The presentation of a profile: figures, advice, page, trace, table, JSON."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from dvexport.errors import UsageError
from dvexport.profile.advice import advise, better_lowering, overhead_share
from dvexport.profile.figures_svg import action_strip, nice_ticks, tile_strip
from dvexport.profile.masks_svg import mask_over_frame, mean_mask, shown_frames
from dvexport.profile.report import render_html, write_html
from dvexport.profile.report_text import result_table
from dvexport.profile.result import (
    ClipInfo,
    DeviceInfo,
    GateStats,
    GateStep,
    Method,
    MinMeanMax,
    NodeTime,
    ProfileResult,
    StepStats,
    StepTimes,
    read_json,
    write_json,
)
from dvexport.profile.trace_events import trace_events, write_trace

FRAMES, GRID, STEM_MACS = 16, 7, 150_000_000
GATE_MACS = 200_000_000
NAMES = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]


def _decide(rng: np.random.Generator, channels: int, frame: int) -> GateStep:
    """A blob that moves over the grid, most channels computed, some reused."""
    rows, columns = np.mgrid[:GRID, :GRID]
    centre = 1 + 4.5 * frame / FRAMES
    radius = rng.uniform(1.6, 3.2)
    mask = (np.hypot(rows - 3.4, columns - centre) < radius).astype(int)
    compute = int(rng.binomial(channels, 0.55))
    reuse = int(rng.binomial(channels - compute, 0.6)) if frame else 0
    return GateStep(
        skip=channels - compute - reuse,
        reuse=reuse,
        compute=compute,
        tiles_active=int(mask.sum()),
        tiles_total=GRID * GRID,
        tile_mask=mask.tolist(),
    )


def _executed(step: GateStep) -> int:
    return int(GATE_MACS * step.compute_share * step.tile_share)


def _nodes(rng: np.random.Generator) -> list[NodeTime]:
    nodes, clock = [NodeTime("stem/Conv", "Conv", None, 900.0, 0.0, 905.0)], 905.0
    for gate in NAMES:
        for op, us in (("Gemm", 60), ("NonZero", 25), ("GatherND", 110), ("Conv", 520), ("ScatterND", 130)):
            took = us * rng.uniform(0.9, 1.1)
            nodes.append(NodeTime(f"{gate}/{op}", op, gate, float(us), clock, took, decides=op == "Gemm"))
            clock += took
    return nodes


def make_result(seed: int = 0, repeats: int = 20) -> ProfileResult:
    rng = np.random.default_rng(seed)
    channels = {name: 64 * 2 ** (int(name[5]) - 1) for name in NAMES}
    steps, gated = [], []
    for frame in range(FRAMES):
        taken = {name: _decide(rng, channels[name], frame) for name in NAMES}
        executed = STEM_MACS + sum(_executed(step) for step in taken.values())
        samples = (4.5 + 9 * executed / 1.75e9) * rng.normal(1, 0.02, repeats)
        gated += samples.tolist()
        steps.append(
            StepStats(
                frame,
                float(np.median(samples)),
                executed,
                STEM_MACS + len(NAMES) * GATE_MACS,
                taken,
                "moving something left to right",
                0.35 + 0.03 * frame,
            )
        )
    gates = [
        GateStats(
            name,
            "tiles",
            f"0.{i}5 of dense at 40 % of the tiles",
            channels[name],
            (GRID, GRID),
            MinMeanMax.of([_executed(step.gates[name]) / 1e9 for step in steps]),
            GATE_MACS / 1e9,
            0.845 if name != "layer4.1" else 1.71,
            1.45,
        )
        for i, name in enumerate(NAMES)
    ]
    return ProfileResult(
        model="dstep-resnet18",
        target="raspberry-pi-4",
        backend="onnx",
        mode="stream",
        clip=ClipInfo("moving_left.mp4", FRAMES, 12.0),
        device=DeviceInfo("Cortex-A72", 4, 2, "onnxruntime", "1.24.0", "Linux 6.6", "performance", [1800.0] * 4, 52.4),
        method=Method(10, repeats),
        forced=None,
        gated=StepTimes(gated),
        dense=StepTimes(rng.normal(13.6, 0.2, FRAMES * repeats).tolist()),
        steps=steps,
        gates=gates,
        nodes=_nodes(rng),
    )


def make_frames(side: int = 112) -> np.ndarray:
    rows, columns = np.mgrid[:side, :side]
    ground = 90 + 50 * np.sin(columns / 9) * np.cos(rows / 13)
    frames = np.repeat(ground[None, :, :, None], FRAMES, 0).repeat(3, 3) * [0.9, 1.0, 0.8]
    for frame in range(FRAMES):
        centre = side * (1.5 + 4.5 * frame / FRAMES) / GRID
        frames[frame, np.hypot(rows - side * 0.55, columns - centre) < side * 0.13] = [235, 190, 90]
    return frames.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def result() -> ProfileResult:
    return make_result()


@pytest.fixture(scope="module")
def page(result: ProfileResult) -> str:
    return render_html(result, make_frames())


class _Balance(HTMLParser):
    """Checks that every element that opens also closes, in order."""

    VOID = frozenset({"meta", "br", "img", "link", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.resources: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.resources += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()


def _visible(page: str) -> str:
    return re.sub(r"<[^>]+>", "", page)


def test_headline_figures_follow_from_the_data(result: ProfileResult) -> None:
    assert result.dense is not None
    executed = np.mean([step.executed_macs for step in result.steps])
    dense = STEM_MACS + len(NAMES) * GATE_MACS
    assert result.flop_ratio == pytest.approx(dense / executed)
    assert result.speedup == pytest.approx(np.median(result.dense.samples_ms) / np.median(result.gated.samples_ms))
    assert result.realisation == pytest.approx(result.speedup / result.flop_ratio)
    assert result.gated.p90 == pytest.approx(np.percentile(result.gated.samples_ms, 90))


def test_spread_is_interquartile_range_over_median() -> None:
    assert StepTimes([1.0, 2.0, 3.0, 4.0, 5.0]).spread == pytest.approx(2 / 3)


def test_without_dense_the_ratios_are_unknown(result: ProfileResult) -> None:
    alone = replace(result, dense=None)
    assert alone.speedup is None
    assert alone.realisation is None
    assert alone.flop_ratio == result.flop_ratio
    assert "dense not measured" in render_html(alone)
    assert any("No dense artifact" in advice.text for advice in advise(alone))


def test_json_round_trip(result: ProfileResult, tmp_path) -> None:
    path = tmp_path / "profile.json"
    write_json(result, path)
    assert list(json.loads(path.read_text()))[:3] == ["speedup", "flop_ratio", "realisation"]
    assert read_json(path) == result
    assert list(tmp_path.iterdir()) == [path]


def test_json_takes_numpy_values(result: ProfileResult) -> None:
    step = replace(result.steps[0], executed_macs=np.int64(5), latency_ms=np.float32(1.5))
    data = json.loads(json.dumps(replace(result, steps=[step]).to_dict()))
    assert ProfileResult.from_dict(data).steps[0].executed_macs == 5


def test_a_file_that_is_no_profile_is_refused(result: ProfileResult, tmp_path) -> None:
    with pytest.raises(UsageError, match="not a dvexport profile"):
        ProfileResult.from_dict({"format": 1, "model": "x"})
    with pytest.raises(UsageError, match="newer"):
        ProfileResult.from_dict(result.to_dict() | {"format": 99})
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UsageError, match="cannot read"):
        read_json(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UsageError, match="not a dvexport profile"):
        read_json(tmp_path / "list.json")


def test_writing_to_a_missing_folder_is_one_clear_error(result: ProfileResult, tmp_path) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        write_html(result, tmp_path / "missing" / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_page_shows_the_figures(result: ProfileResult, page: str) -> None:
    text = _visible(page)
    for value in (result.speedup, result.flop_ratio, result.realisation, result.gated.median):
        assert f"{value:.2f}" in text
    assert f"{result.gated.p90:.2f} / {result.gated.p99:.2f}" in text
    gate = result.gates[2]
    for value in (gate.executed_gmacs.min, gate.executed_gmacs.mean, gate.executed_gmacs.max):
        assert f'<td class="num">{value:.3f}</td>' in page
    assert gate.reason in text
    assert "10 warm-up steps" in text


def test_page_is_balanced_and_self_contained(page: str) -> None:
    parsed = _Balance(page)
    assert parsed.open == []
    assert parsed.resources
    assert all(value.startswith(("#frame-", "data:image/jpeg;base64,")) for value in parsed.resources)
    assert not re.search(r"https?://|@import|url\(", page)


def test_page_shows_frames_once_and_masks_over_them(page: str) -> None:
    parsed = _Balance(page)
    assert parsed.seen.count("symbol") == 8
    # Each of 8 frames: alone, under the mean mask, and under the mask of each gate.
    assert parsed.seen.count("use") == 8 * (2 + len(NAMES))


def test_page_without_frames_still_shows_masks(result: ProfileResult) -> None:
    parsed = _Balance(render_html(result))
    assert parsed.open == []
    assert "use" not in parsed.seen
    assert 'class="overlay alone"' in render_html(result)


@pytest.mark.parametrize("frames", [1, 2, 300])
def test_page_of_short_and_long_clips(result: ProfileResult, frames: int) -> None:
    steps = [replace(result.steps[i % FRAMES], frame=i) for i in range(frames)]
    other = replace(result, steps=steps, gated=StepTimes([5.0] * frames), dense=StepTimes([9.0] * frames))
    page = render_html(other)
    assert _Balance(page).open == []
    assert "nan" not in _visible(page)


def test_page_of_a_model_without_gates_or_with_nothing_executed(result: ProfileResult) -> None:
    plain = [replace(step, gates={}) for step in result.steps]
    assert _Balance(render_html(replace(result, steps=plain, gates=[], nodes=[]))).open == []
    idle = replace(result, steps=[replace(step, executed_macs=0) for step in result.steps])
    assert idle.flop_ratio is None
    assert _Balance(render_html(idle)).open == []


def test_wrong_frames_are_refused(result: ProfileResult) -> None:
    with pytest.raises(UsageError, match="uint8"):
        render_html(result, np.zeros((FRAMES, 8, 8, 3), np.float32))
    with pytest.raises(UsageError, match="4 frames were given"):
        render_html(result, np.zeros((4, 8, 8, 3), np.uint8))


def test_hostile_names_are_escaped(result: ProfileResult) -> None:
    evil = '"><script>alert(1)</script>[bold]{{ 7*7 }}'
    steps = [
        replace(step, label=evil, gates={evil if k == NAMES[0] else k: v for k, v in step.gates.items()})
        for step in result.steps
    ]
    hostile = replace(
        result,
        model=evil,
        clip=replace(result.clip, name=evil),
        device=replace(result.device, cpu=evil, os=evil),
        steps=steps,
        gates=[replace(result.gates[0], gate=evil, reason=evil, lowering=evil), *result.gates[1:]],
        nodes=[replace(node, node=evil, op=evil, gate=evil) for node in result.nodes],
        forced={evil: 0.5},
    )
    page = render_html(hostile, make_frames())
    assert _Balance(page).seen.count("script") == 1
    assert "alert(1)</script>" not in page
    assert "49" not in re.findall(r"\[bold\](\S+)", page)
    assert evil in result_table(hostile)


def _spans(events: list[dict]) -> dict[tuple[int, int], list[tuple[float, float]]]:
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            span = (event["ts"], event["ts"] + event["dur"])
            tracks.setdefault((event["pid"], event["tid"]), []).append(span)
    return tracks


def _assert_nested(spans: list[tuple[float, float]]) -> None:
    for i, (a, b) in enumerate(spans):
        assert b >= a
        for c, d in spans[i + 1 :]:
            apart = d <= a + 1e-6 or c >= b - 1e-6
            inside = (a - 1e-6 <= c and d <= b + 1e-6) or (c - 1e-6 <= a and b <= d + 1e-6)
            assert apart or inside


def test_trace_loads_and_events_nest(result: ProfileResult, tmp_path) -> None:
    write_trace(result, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert events == json.loads(json.dumps(trace_events(result)))
    tracks = _spans(events)
    assert len(tracks) == 1 + 1 + len(NAMES)  # frames, outside the gates, each gate
    assert len(tracks[1, 0]) == FRAMES
    for spans in tracks.values():
        _assert_nested(spans)


def test_trace_trims_rounded_times_and_keeps_branches_inside(result: ProfileResult) -> None:
    nodes = [
        NodeTime("if", "If", "g", 90.0, 10.0, 100.0),
        NodeTime("a", "Conv", "g", 50.0, 12.0, 60.0),
        NodeTime("b", "Conv", "g", 50.0, 70.0, 45.0),  # ends at 115, after its If
        NodeTime("c", "Mul", "g", 30.0, 109.0),  # begins before the If has ended; no duration
        NodeTime("d", "Add", "g", 5.0, 130.0),
    ]
    events = trace_events(replace(result, nodes=nodes))
    spans = _spans(events)[2, 1]
    _assert_nested(spans)
    assert (12.0, 70.0) in spans
    assert (130.0, 135.0) in spans
    assert [event["name"] for event in events if event["ph"] == "X" and event["pid"] == 2] == [
        "g", "if", "a", "b", "c", "d",
    ]  # fmt: skip


def _texts(result: ProfileResult, gate: str | None) -> str:
    return " ".join(advice.text for advice in advise(result) if advice.gate == gate)


def test_advice_names_the_gate_that_costs_more_than_it_saves(result: ProfileResult) -> None:
    advice = advise(result)
    costly = [item for item in advice if "costs" in item.text]
    assert [item.gate for item in costly] == ["layer4.1"]
    assert "0.26 ms" in costly[0].text
    assert "'masked' in place of 'tiles'" in costly[0].text  # its channels are denser than its tiles
    assert "38% of its time decides and moves data" in costly[0].text
    assert advice[0].severity == "warning"


def test_advice_names_the_worst_gates_and_sums_up_the_rest(result: ProfileResult) -> None:
    low = [item for item in advise(result) if item.gate and "less than its FLOPs allow" in item.text]
    kept = [gate for gate in result.gates if gate.gate != "layer4.1"]
    worst = sorted(kept, key=lambda gate: gate.executed_fraction)[:3]
    assert [item.gate for item in low] == [gate.gate for gate in worst]
    rest = next(item for item in advise(result) if "The same holds" in item.text)
    assert rest.text.count("layer") == 4


def test_advice_on_flops_that_the_lowering_does_not_save(result: ProfileResult) -> None:
    gate = replace(result.gates[0], lowering="masked", reason="above break-even", median_ms=1.4)
    text = _texts(replace(result, gates=[gate]), gate.gate)
    assert "executes them all (above break-even)" in text
    assert "'tiles'" in text
    slower = replace(gate, median_ms=1.6)
    assert "--lowering GATE=tiles" in _texts(replace(result, gates=[slower]), gate.gate)


def test_better_lowering_follows_the_sparser_unit(result: ProfileResult) -> None:
    gate = result.gates[0]
    steps = [
        replace(step, gates={gate.gate: GateStep(0, 0, 64, 10, 49)}) for step in result.steps
    ]  # every channel, few tiles
    assert better_lowering(replace(result, steps=steps), replace(gate, lowering="groups")) == "tiles"
    assert better_lowering(replace(result, steps=steps), replace(gate, lowering="masked")) == "tiles"
    assert better_lowering(replace(result, steps=steps), replace(gate, lowering="tiles")) == "masked"


def test_better_lowering_follows_the_cost_table(result: ProfileResult) -> None:
    expected = {"masked": 0.9, "tiles": 0.5, "winograd4": 0.4}
    gate = replace(result.gates[0], lowering="winograd4", median_ms=0.8, expected_ms=expected)
    assert better_lowering(result, gate) == "tiles"
    assert better_lowering(result, replace(gate, median_ms=0.45)) == "winograd4"


def test_advice_on_gates_that_never_or_always_skip(result: ProfileResult) -> None:
    taken = {"layer1.0": GateStep(0, 0, 64, 49, 49), "layer1.1": GateStep(60, 4, 0, 20, 49)}
    taken["layer2.0"] = GateStep(0, 0, 128, 0, 49)
    steps = [replace(step, gates=step.gates | taken) for step in result.steps]
    constant = replace(result, steps=steps)
    assert "Never skips" in _texts(constant, "layer1.0")
    assert "Always skips" not in _texts(constant, "layer1.1")  # it reuses
    assert "Always skips" in _texts(constant, "layer2.0")
    assert "Never skips" not in _texts(replace(constant, forced={"tiles": 1.0}), "layer1.0")


def test_advice_on_a_measurement_that_is_not_reliable(result: ProfileResult) -> None:
    noisy = replace(
        result,
        dense=StepTimes(np.random.default_rng(1).uniform(8, 20, 200).tolist()),
        device=replace(result.device, governor="powersave", threads=4),
    )
    text = _texts(noisy, None)
    assert "not reliable" in text
    assert "'powersave'" in text
    assert "4 threads run on 4 cores" in text
    assert "not reliable" not in _texts(result, None)


def test_advice_on_slow_and_low_realisation(result: ProfileResult) -> None:
    assert "slower than the dense" in _texts(replace(result, dense=StepTimes([3.0] * 9)), None)
    low = replace(result, dense=StepTimes([result.gated.median * 1.1] * 9))
    assert "of the speed-up that the decisions allow arrives" in _texts(low, None)


def test_overhead_share_leaves_control_nodes_out(result: ProfileResult) -> None:
    nodes = [
        NodeTime("if", "If", "g", 1000.0),
        NodeTime("conv", "FusedConv", "g", 60.0),
        NodeTime("gather", "GatherND", "g", 30.0),
        NodeTime("policy", "Gemm", "g", 10.0, decides=True),
    ]
    assert overhead_share(replace(result, nodes=nodes), "g") == pytest.approx(0.4)
    assert overhead_share(result, "absent") is None


def test_advice_always_says_something(result: ProfileResult) -> None:
    ideal = result.gated.median * (result.flop_ratio or 0)
    good = replace(result, gates=[], nodes=[], dense=StepTimes([ideal] * 9))
    assert any("nothing stands out" in advice.text for advice in advise(good))
    assert all(advice.severity == "info" for advice in advise(good))


def test_mean_mask_compares_grids_that_differ() -> None:
    gates = {
        "a": GateStep(0, 0, 1, 2, 4, [[1, 0], [1, 0]]),
        "b": GateStep(0, 0, 1, 3, 9, [[1, 1, 1], [0, 0, 0], [0, 0, 0]]),
    }
    mean = mean_mask(StepStats(0, 1.0, 1, 1, gates))
    assert mean is not None
    assert mean.shape == (6, 6)
    assert mean[0].tolist() == [1, 1, 1, 0.5, 0.5, 0.5]
    assert mean[5].tolist() == [0.5, 0.5, 0.5, 0, 0, 0]
    assert mean_mask(StepStats(0, 1.0, 1, 1, {"a": GateStep(0, 0, 1)})) is None


def test_mask_drawing_covers_each_cell_once() -> None:
    mask = np.array([[1, 1, 0], [0, 1, 0]])
    drawing = str(mask_over_frame(mask, None, 100.0, "t"))
    areas = [float(width) * float(height) for width, height in re.findall(r"h([\d.]+)v([\d.]+)h-", drawing)]
    assert sum(areas) == pytest.approx(100 * 100, rel=1e-3)
    red = re.search(r'fill="rgb\(226 48 38\)" d="([^"]*)"', drawing)
    assert red is not None
    assert red[1].count("M") == 2  # a run of two, a run of one


def test_strips_of_long_clips_sum_up_runs_of_frames() -> None:
    strip = str(action_strip([GateStep(1, 0, 3), GateStep(3, 0, 1)] * 100))
    assert strip.count("<g>") == 100
    assert "frames 198 to 199: compute 50%, reuse 0%, skip 50% of the channels" in strip
    assert "frame 1: 25% of tiles active" in str(tile_strip([GateStep(0, 0, 1, 1, 4)] * 2))


def test_shown_frames_and_ticks() -> None:
    assert shown_frames(3) == [0, 1, 2]
    assert shown_frames(16) == [0, 2, 4, 6, 9, 11, 13, 15]
    assert nice_ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(0.13, 0.48, 4) == [0.2, 0.3, 0.4]


def test_table_has_headline_and_a_row_for_each_gate(result: ProfileResult) -> None:
    text = result_table(result)
    assert f"realisation {result.realisation:.2f}" in text
    assert "\x1b" not in text
    for gate in result.gates:
        row = next(line for line in text.splitlines() if line.startswith(f"{gate.gate} "))
        assert f"{gate.executed_gmacs.mean:.3f}" in row
        assert f"{gate.median_ms:.2f}" in row
    assert "warning: layer4.1:" in text


def test_times_of_another_kind_of_processor_are_told_as_such(result: ProfileResult) -> None:
    here, elsewhere = (replace(result, device=replace(result.device, is_target=known)) for known in (True, False))
    assert "another kind of processor" in result_table(elsewhere)
    assert "another kind of processor" not in result_table(here)
