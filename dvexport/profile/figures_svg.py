"""The charts of the report as inline SVG, drawn by hand: no plotting library, no script.

Colours are CSS classes of the page, so one drawing serves the light and the dark scheme. Each mark
has a `<title>`, which browsers show on hover. All text goes through `Markup.format`, which escapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from dvexport.profile.result import GateStep, StepStats, StepTimes

__all__ = [
    "action_strip",
    "ecdf",
    "frame_axis",
    "gmacs_per_frame",
    "histogram",
    "latency_per_frame",
    "nice_ticks",
    "tile_strip",
]

WIDTH, HEIGHT = 540, 216
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 26, 36
STRIP_WIDTH, STRIP_HEIGHT = 400, 26
BINS = 36
MAX_CELLS = 100


def _join(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round tick values (1, 2 or 5 times a power of ten apart) within `low` to `high`."""
    span = max(high - low, 1e-12)
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass
class _Plot:
    """A plot area with linear scales: `x` and `y` map data to the drawing."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_label: str
    y_label: str

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 2)

    def axes(self, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> Markup:
        """Grid lines, tick labels and axis titles."""
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        grid = [
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="tick end" x="{}" y="{}">{}</text>'
            ).format(LEFT, right, self.y(t), self.y(t), LEFT - 7, self.y(t) + 3.5, f"{t:g}")
            for t in y_ticks
        ]
        labels = [
            Markup('<text class="tick mid" x="{}" y="{}">{}</text>').format(self.x(t), bottom + 14, f"{t:g}")
            for t in x_ticks
        ]
        titles = Markup(
            '<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>'
            '<text class="label end" x="{}" y="{}">{}</text><text class="label" x="{}" y="11">{}</text>'
        ).format(LEFT, right, bottom, bottom, right, HEIGHT - 5, self.x_label, 4, self.y_label)
        return _join([*grid, *labels, titles])


def _rect(style: str, x: float, y: float, width: float, height: float, title: str = "") -> Markup:
    about = Markup("<title>{}</title>").format(title) if title else Markup("")
    return Markup('<rect class="{}" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}">{}</rect>').format(
        style, x, y, width, height, about
    )


def _svg(body: Markup, alt: str) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, alt, body
    )


def _sides(gated: StepTimes, dense: StepTimes | None) -> list[tuple[str, StepTimes]]:
    return [("gated", gated)] + ([("dense", dense)] if dense else [])


def _latency_range(sides: list[tuple[str, StepTimes]]) -> tuple[float, float]:
    """From the fastest step to just past the slower P99, so that one outlier doesn't flatten the rest."""
    low = min(times.min for _, times in sides)
    high = max(times.p99 for _, times in sides)
    margin = max(high - low, high * 0.02) * 0.04
    return max(low - margin, 0.0), high + margin


def ecdf(gated: StepTimes, dense: StepTimes | None) -> Markup:
    """Return the share of steps at most so slow, of both artifacts, medians marked."""
    sides = _sides(gated, dense)
    low, high = _latency_range(sides)
    plot = _Plot((low, high), (0, 100), "step latency, ms", "% of steps at most so slow")
    marks = []
    for name, times in sides:
        ordered = np.sort(np.asarray(times.samples_ms, dtype=float))
        levels = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), 300)).round().astype(int))
        points = [(ordered[i], 100 * (i + 1) / len(ordered)) for i in levels if ordered[i] <= high]
        path = f"M{plot.x(points[0][0])} {plot.y(0)}" + "".join(
            f"H{plot.x(value)}V{plot.y(share)}" for value, share in points
        )
        marks.append(
            Markup(
                '<path class="line {}" d="{}"/><circle class="dot {}" cx="{}" cy="{}" r="4">'
                "<title>{}: median {} ms, P90 {}, P99 {}</title></circle>"
            ).format(
                name, path, name, plot.x(times.median), plot.y(50), name,
                f"{times.median:.2f}", f"{times.p90:.2f}", f"{times.p99:.2f}",
            )
        )  # fmt: skip
    return _svg(
        plot.axes(nice_ticks(low, high, 7), [0, 25, 50, 75, 100]) + _join(marks),
        "Cumulative latency distribution",
    )


def histogram(gated: StepTimes, dense: StepTimes | None) -> Markup:
    """Return the histogram of step latencies of both artifacts, in shares of their steps."""
    sides = _sides(gated, dense)
    low, high = _latency_range(sides)
    edges = np.linspace(low, high, BINS + 1)
    shares = {
        name: np.histogram(np.clip(times.samples_ms, low, high), edges)[0] / len(times.samples_ms) * 100
        for name, times in sides
    }
    top = max(float(values.max()) for values in shares.values()) * 1.1
    plot = _Plot((low, high), (0, top), "step latency, ms", "% of steps")
    width = plot.x(edges[1]) - plot.x(edges[0]) - 1
    marks = []
    for name, values in shares.items():
        for left, right, share in zip(edges[:-1], edges[1:], values, strict=True):
            if share > 0:
                upto = f"to {right:.2f} ms" if right < edges[-1] else "ms and more"
                title = f"{name}: {share:.1f}% of steps at {left:.2f} {upto}"
                y = plot.y(share)
                marks.append(_rect(f"bar {name}", plot.x(left) + 0.5, y, width, plot.y(0) - y, title))
    return _svg(plot.axes(nice_ticks(low, high, 7), nice_ticks(0, top, 4)) + _join(marks), "Latency histogram")


def _frame_plot(steps: Sequence[StepStats], top: float, label: str) -> tuple[_Plot, list[float]]:
    plot = _Plot((-0.5, len(steps) - 0.5), (0, top * 1.12), "frame", label)
    return plot, [t for t in nice_ticks(0, len(steps) - 1, 8) if t == int(t)]


def _reference(plot: _Plot, value: float, text: str) -> Markup:
    """A dashed line over the whole width: the dense artifact."""
    return Markup(
        '<line class="reference" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="label end" x="{}" y="{}">{}</text>'
    ).format(LEFT, WIDTH - RIGHT, plot.y(value), plot.y(value), WIDTH - RIGHT - 2, plot.y(value) - 5, text)


def latency_per_frame(steps: Sequence[StepStats], dense: StepTimes | None) -> Markup:
    """Return the latency of each frame of the clip beside the dense median."""
    top = max([step.latency_ms for step in steps] + ([dense.median] if dense else []))
    plot, ticks = _frame_plot(steps, top, "latency, ms")
    path = "M" + "L".join(f"{plot.x(i)} {plot.y(step.latency_ms)}" for i, step in enumerate(steps))
    dots = [
        Markup('<circle class="dot gated" cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
            plot.x(i), plot.y(step.latency_ms), 3.5 if len(steps) <= 60 else 2,
            f"frame {step.frame}: {step.latency_ms:.2f} ms, {step.executed_macs / 1e9:.3f} GMACs",
        )
        for i, step in enumerate(steps)
    ]  # fmt: skip
    reference = _reference(plot, dense.median, f"dense median {dense.median:.2f}") if dense else Markup("")
    axes = plot.axes(ticks, nice_ticks(0, top * 1.12, 4))
    line = Markup('<path class="line gated" d="{}"/>').format(path)
    return _svg(axes + reference + line + _join(dots), "Latency per frame")


def gmacs_per_frame(steps: Sequence[StepStats]) -> Markup:
    """Return the executed GMACs of each frame beside the dense ones."""
    dense = float(np.mean([step.dense_macs for step in steps])) / 1e9
    top = max([dense] + [step.executed_macs / 1e9 for step in steps])
    plot, ticks = _frame_plot(steps, top, "executed GMACs")
    width = plot.x(1) - plot.x(0)
    gap = min(width * 0.2, 3.0)
    bars = []
    for i, step in enumerate(steps):
        executed = step.executed_macs / 1e9
        title = f"frame {step.frame}: {executed:.3f} of {step.dense_macs / 1e9:.3f} GMACs"
        x, y = plot.x(i - 0.5) + gap / 2, plot.y(executed)
        bars.append(_rect("bar gated", x, y, width - gap, plot.y(0) - y, title))
    marks = _join([*bars, _reference(plot, dense, f"dense {dense:.3f}")])
    return _svg(plot.axes(ticks, nice_ticks(0, top * 1.12, 4)) + marks, "Executed GMACs per frame")


def _strip(body: Markup, alt: str) -> Markup:
    return Markup(
        '<svg class="strip" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(STRIP_WIDTH, STRIP_HEIGHT, alt, body)


@dataclass
class _Cell:
    """One cell of a strip: the frames it stands for, summed, its place and its name."""

    step: GateStep
    x: float
    width: float
    frames: str


def _cells(decisions: Sequence[GateStep]) -> list[_Cell]:
    """Return the cells of a strip: one a frame, or runs of frames where a clip has too many to see."""
    pitch = STRIP_WIDTH / len(decisions)
    cells = []
    for run in np.array_split(np.arange(len(decisions)), min(len(decisions), MAX_CELLS)):
        steps = [decisions[i] for i in run]
        first, last = int(run[0]), int(run[-1])
        total = GateStep(
            sum(s.skip for s in steps),
            sum(s.reuse for s in steps),
            sum(s.compute for s in steps),
            sum(s.tiles_active for s in steps),
            sum(s.tiles_total for s in steps),
        )
        width = len(run) * pitch
        name = f"frame {first}" if first == last else f"frames {first} to {last}"
        cells.append(_Cell(total, first * pitch, width - min(width * 0.12, 2.0), name))
    return cells


def _stack(cell: _Cell, parts: Sequence[tuple[str, float]], title: str) -> Markup:
    """Return one cell as a stack of (style, share) from the bottom up."""
    top, drawn = float(STRIP_HEIGHT), []
    for style, share in parts:
        top -= STRIP_HEIGHT * share
        if share:
            drawn.append(_rect(style, cell.x, top, cell.width, STRIP_HEIGHT * share))
    return Markup("<g><title>{}: {}</title>{}</g>").format(cell.frames, title, _join(drawn))


def action_strip(decisions: Sequence[GateStep]) -> Markup:
    """Return one gate's channel actions over time: compute below, then reuse, then skip."""
    stacks = []
    for cell in _cells(decisions):
        step, channels = cell.step, max(cell.step.channels, 1)
        parts = [(name, getattr(step, name) / channels) for name in ("compute", "reuse", "skip")]
        title = ", ".join(f"{name} {share:.0%}" for name, share in parts) + " of the channels"
        stacks.append(_stack(cell, parts, title))
    return _strip(_join(stacks), "Channel actions over time")


def tile_strip(decisions: Sequence[GateStep]) -> Markup:
    """Return one gate's share of active tiles over time."""
    stacks = []
    for cell in _cells(decisions):
        share = cell.step.tile_share
        stacks.append(_stack(cell, [("compute", share), ("skip", 1 - share)], f"{share:.0%} of tiles active"))
    return _strip(_join(stacks), "Active tiles over time")


def frame_axis(frames: int) -> Markup:
    """Return the frame numbers that stand below the strips."""
    width = STRIP_WIDTH / frames
    ticks = [t for t in nice_ticks(0, frames - 1, 8) if t == int(t)]
    labels = [
        Markup('<text class="tick mid" x="{}" y="11">{}</text>').format(round((t + 0.5) * width, 2), f"{t:g}")
        for t in ticks
    ]
    return Markup('<svg class="strip-axis" viewBox="0 0 {} 14" aria-hidden="true">{}</svg>').format(
        STRIP_WIDTH, _join(labels)
    )
