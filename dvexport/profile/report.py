"""A profile as one self-contained HTML page: no external resource, legible without script.

The page answers in this order: does the gating pay (headline figures), what to change (advice),
where the model looks (tile masks over the frames), how latency behaves, what each gate and node
costs, and how it was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

import dvexport.profile.figures_svg as figures
import dvexport.profile.masks_svg as masks
from dvexport.errors import UsageError
from dvexport.files import atomic_write
from dvexport.profile.advice import advise
from dvexport.profile.gate_advice import decisions
from dvexport.profile.report_text import number
from dvexport.profile.result import GateStats, NodeTime, ProfileResult, TokenStage

__all__ = ["render_html", "write_html"]

TOP_NODES = 20
_ACTIONS = ("compute", "reuse", "skip")


@dataclass
class _GateView:
    """What the page shows of one gate: shares over the clip and its strips over time."""

    stats: GateStats
    shares: dict[str, float]
    tile_share: float | None
    actions: Markup
    tiles: Markup


@dataclass
class _TokenView:
    """The drawings of the token section: for each stage its survivors, over the frames of these indices."""

    symbols: Markup
    stages: list[tuple[TokenStage, list[tuple[int, Markup]]]]


@dataclass
class _MaskView:
    """The drawings of the mask section, one a shown frame."""

    indices: list[int]
    symbols: Markup
    frames: list[Markup]
    mean: list[Markup]
    by_gate: dict[str, list[Markup]]


def render_html(result: ProfileResult, frames: np.ndarray | None = None) -> str:
    """Return the page.

    Args:
        result: the profile.
        frames: uint8 `[T, H, W, 3]`, RGB, one a step of `result` (all of the clip where a model
            reads it as one), cropped as the model saw them; None draws the masks on plain ground.

    Raises:
        UsageError: `frames` is not of that shape and type.
    """
    if frames is not None:
        _check_frames(result, frames)
    return _template().render(
        result=result,
        advice=advise(result),
        cards=_cards(result),
        charts=_charts(result),
        gates=_gate_views(result),
        axis=figures.frame_axis(len(result.steps)),
        masks=None if result.whole_clip else _mask_view(result, frames),
        tokens=_token_view(result, frames),
        nodes=_top_nodes(result),
        node_total=_node_total(result),
    )


def write_html(result: ProfileResult, path: str | Path, frames: np.ndarray | None = None) -> None:
    """Write `render_html`'s page; nothing half-written is left at `path`."""
    page = render_html(result, frames)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("dvexport.profile", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template("report.html.j2")


def _check_frames(result: ProfileResult, frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise UsageError(
            "frames for the page must be uint8 of shape [T, H, W, 3]",
            why=f"they are {frames.dtype} of shape {list(frames.shape)}",
        )
    if not result.whole_clip and len(frames) != len(result.steps):
        raise UsageError(
            f"{len(frames)} frames were given for a profile of {len(result.steps)} steps",
            hint="pass the frames that were profiled",
        )


@dataclass
class _Card:
    """One headline figure; `meter` (0 to 1) draws a bar below it."""

    label: str
    value: str
    unit: str
    note: str
    meter: float | None = None


def _times(ratio: float | None) -> tuple[str, str]:
    """Return a ratio and its unit, none where the ratio is unknown."""
    return number(ratio), "" if ratio is None else "x"


def _ms(value: float) -> str:
    """Return milliseconds with three digits, which fit a card however slow the device is."""
    return number(value, 2 if value < 10 else 1 if value < 100 else 0)


def _cards(result: ProfileResult) -> list[_Card]:
    gated, dense, executed = result.gated, result.dense, result.executed_gmacs
    beside = f"dense {_ms(dense.median)} ms" if dense else "dense not measured"
    tails = f"dense {_ms(dense.p90)} / {_ms(dense.p99)} ms" if dense else "dense not measured"
    realised = result.realisation
    return [
        _Card("Speed-up", number(result.speedup), "x" if dense else "", "dense over gated median"),
        _Card(
            "FLOP ratio",
            number(result.flop_ratio),
            "x" if result.flop_ratio else "",
            "dense over executed GMACs",
        ),
        _Card(
            "Realisation",
            number(realised),
            "",
            "1.0: every saved FLOP is saved time" if realised is not None else "needs the dense artifact",
            None if realised is None else min(realised, 1.0),
        ),
        _Card("Median step", _ms(gated.median), "ms", beside),
        _Card("P90 / P99", f"{_ms(gated.p90)} / {_ms(gated.p99)}", "ms", tails),
        _Card(
            f"GMACs per {result.unit}",
            f"{executed.mean:.3f}",
            "",
            f"min {executed.min:.3f}, max {executed.max:.3f}, dense {result.dense_gmacs:.3f}",
        ),
    ]


def _charts(result: ProfileResult) -> dict[str, Markup]:
    return {
        "ecdf": figures.ecdf(result.gated, result.dense),
        "histogram": figures.histogram(result.gated, result.dense),
        "latency": figures.latency_per_frame(result.steps, result.dense),
        "gmacs": figures.gmacs_per_frame(result.steps),
    }


def _gate_views(result: ProfileResult) -> list[_GateView]:
    views = []
    for stats in result.gates:
        taken = decisions(result, stats.gate)
        if not taken:
            continue
        channels = sum(step.channels for step in taken) or 1
        shares = {name: sum(getattr(s, name) for s in taken) / channels for name in _ACTIONS}
        tiled = stats.grid is not None
        tile_share = float(np.mean([step.tile_share for step in taken])) if tiled else None
        tiles = figures.tile_strip(taken) if tiled else Markup("")
        views.append(_GateView(stats, shares, tile_share, figures.action_strip(taken), tiles))
    return views


def _mask_view(result: ProfileResult, frames: np.ndarray | None) -> _MaskView | None:
    """Return None where no gate has tiles and there are no frames to show."""
    indices = masks.shown_frames(len(result.steps))
    mean = [masks.mean_mask(result.steps[i]) for i in indices]
    tiled = all(mask is not None for mask in mean)
    if frames is None and not tiled:
        return None
    height = 100.0 if frames is None else round(100 * frames.shape[1] / frames.shape[2], 2)
    under = [None if frames is None else i for i in indices]
    return _MaskView(
        indices,
        Markup("") if frames is None else masks.frame_symbols(frames, indices),
        [] if frames is None else [masks.plain_frame(i, height) for i in indices],
        [
            masks.mask_over_frame(mask, at, height, f"frame {i}: {mask.mean():.0%} of the area computed")
            for mask, at, i in zip(mean, under, indices, strict=True)
            if mask is not None
        ],
        _masks_by_gate(result, indices, under, height) if tiled else {},
    )


def _token_view(result: ProfileResult, frames: np.ndarray | None) -> _TokenView | None:
    """Draw which tokens are left over the first frame that each of them spans; None where none are chosen."""
    if not result.tokens:
        return None
    shown: set[int] = set()
    rows: list[tuple[TokenStage, list[tuple[int, Markup]]]] = []
    height = 100.0 if frames is None else round(100 * frames.shape[1] / frames.shape[2], 2)
    for stage in result.tokens:
        left = np.asarray(stage.left if stage.left is not None else np.zeros((0, 1, 1)), dtype=float)
        span = 1 if frames is None or not len(left) else max(1, len(frames) // len(left))
        times = masks.shown_frames(len(left)) if len(left) else []
        shown.update(time * span for time in times)
        drawings = []
        for time in times:
            under = None if frames is None else time * span
            title = f"{stage.name}, frame {time * span}: {left[time].mean():.0%} of its tokens left"
            name = f"left-{len(rows)}-{time}"
            drawings.append((time * span, masks.left_of_frame(left[time] != 0, under, height, title, name)))
        rows.append((stage, drawings))
    symbols = Markup("") if frames is None else masks.frame_symbols(frames, sorted(shown))
    return _TokenView(symbols, rows)


def _masks_by_gate(
    result: ProfileResult, indices: Sequence[int], under: Sequence[int | None], height: float
) -> dict[str, list[Markup]]:
    rows: dict[str, list[Markup]] = {}
    for i, at in zip(indices, under, strict=True):
        for name, gate in result.steps[i].gates.items():
            if gate.tile_mask:
                title = f"{name}, frame {i}: {gate.tiles_active} of {gate.tiles_total} tiles"
                mask = np.asarray(gate.tile_mask, dtype=float)
                rows.setdefault(name, []).append(masks.mask_over_frame(mask, at, height, title))
    return rows


def _node_total(result: ProfileResult) -> float:
    """Return the node time of a step in microseconds; control nodes enclose others, so not summed."""
    return sum(node.median_us for node in result.nodes if node.role != "control")


def _top_nodes(result: ProfileResult) -> list[NodeTime]:
    plain = [node for node in result.nodes if node.role != "control"]
    return sorted(plain, key=lambda node: -node.median_us)[:TOP_NODES]
