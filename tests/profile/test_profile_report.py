"""The presentation of a profile: figures, page, trace, table, JSON."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from sample_profile import FRAMES, GATE_MACS, NAMES, STEM_MACS, make_frames, make_result, result_table

from dvexport.errors import UsageError
from dvexport.profile.advice import AdviceKind, advise
from dvexport.profile.figures_svg import action_strip, nice_ticks, tile_strip
from dvexport.profile.masks_svg import left_of_frame, mask_over_frame, mean_mask, shown_frames
from dvexport.profile.report import render_html, write_html
from dvexport.profile.result import (
    GateStep,
    NodeTime,
    ProfileResult,
    StepStats,
    StepTimes,
    write_json,
)
from dvexport.profile.trace_events import trace_events, write_trace


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
    assert any(advice.kind is AdviceKind.NO_DENSE for advice in advise(alone))


def test_json_round_trip(result: ProfileResult, tmp_path) -> None:
    path = tmp_path / "profile.json"
    write_json(result, path)
    assert list(json.loads(path.read_text()))[:3] == ["speedup", "flop_ratio", "realisation"]
    assert ProfileResult.from_dict(json.loads(path.read_text())) == result
    assert list(tmp_path.iterdir()) == [path]


def test_json_takes_numpy_values(result: ProfileResult) -> None:
    step = replace(result.steps[0], executed_macs=np.int64(5), latency_ms=np.float32(1.5))
    data = json.loads(json.dumps(replace(result, steps=[step]).to_dict()))
    assert ProfileResult.from_dict(data).steps[0].executed_macs == 5


def test_a_file_that_is_no_profile_is_refused(result: ProfileResult) -> None:
    with pytest.raises(UsageError, match="not a dvexport profile"):
        ProfileResult.from_dict({"format": 1, "model": "x"})
    with pytest.raises(UsageError, match="newer"):
        ProfileResult.from_dict(result.to_dict() | {"format": 99})
    with pytest.raises(UsageError, match="not a dvexport profile"):
        ProfileResult.from_dict([1])


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


def test_each_drawn_frame_has_its_caption_below(result: ProfileResult, page: str) -> None:
    film = page.split('<div class="film">')[1].split("<details>")[0]
    figures = film.split("<figure>")[1:]
    assert len(figures) == 8
    for figure, index in zip(figures, shown_frames(FRAMES), strict=True):
        assert figure.count("<svg") == 2  # the frame and the masks over it
        assert f"<figcaption>frame {index}<br>{result.steps[index].label}" in figure


def test_tokens_that_are_left_keep_their_colours() -> None:
    left = np.array([[True, False], [False, False]])
    drawing = str(left_of_frame(left, 3, 100.0, "t", "left-0-3"))
    cell = "M0 0h50v50h-50z"
    assert f'<clipPath id="left-0-3"><path d="{cell}"/></clipPath>' in drawing
    assert drawing.count('href="#frame-3"') == 2  # faded, and the part that is left
    assert 'clip-path="url(#left-0-3)"' in drawing
    alone = str(left_of_frame(left, None, 100.0, "t", "left-0-3"))
    assert "href" not in alone
    assert cell in alone


@pytest.mark.parametrize(("scale", "shown"), [(1, "7.3"), (10, "73."), (1000, "73")])
def test_a_card_has_room_for_its_figures_and_their_unit(result: ProfileResult, scale: int, shown: str) -> None:
    slow = replace(result, gated=StepTimes([7.31 * scale, 7.31 * scale]))
    page = render_html(slow)
    (value,) = re.findall(r'P90 / P99</div>\s*<div class="value long">([^<]*)<span class="unit">ms</span>', page)
    assert value.startswith(shown)
    assert len(value) <= len("7310 / 7310") + 1  # with the mark that keeps the unit on the line
