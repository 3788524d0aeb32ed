"""Tile masks drawn over the frames the model saw (figure 3 of the D-STEP paper), and the tokens that are left of them.

Red is computed, blue is skipped. A frame is stored once in the page, as a JPEG inside an SVG symbol,
and referred to by every drawing that shows it.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from PIL import Image

from dvexport.profile.result import StepStats

__all__ = ["frame_symbols", "left_of_frame", "mask_over_frame", "mean_mask", "plain_frame", "shown_frames", "upsampled"]

SHOWN, SIDE, QUALITY = 8, 224, 82
MAX_GRID = 64
LEVELS = 10
BLUE, RED = np.array([38, 92, 214]), np.array([226, 48, 38])


def shown_frames(count: int) -> list[int]:
    """Return the indices of at most 8 frames, evenly spaced from first to last."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(count, SHOWN)).round())]


def _jpeg(frame: np.ndarray) -> str:
    image = Image.fromarray(np.ascontiguousarray(frame))
    image.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=QUALITY)
    return base64.b64encode(data.getvalue()).decode("ascii")


def frame_symbols(frames: np.ndarray, shown: Sequence[int]) -> Markup:
    """Return the hidden SVG that holds the frames `[T, H, W, 3]` (uint8) at indices `shown`."""
    symbols = [
        Markup(
            '<symbol id="frame-{}" viewBox="0 0 100 100" preserveAspectRatio="none">'
            '<image width="100" height="100" preserveAspectRatio="none" '
            'href="data:image/jpeg;base64,{}"/></symbol>'
        ).format(i, _jpeg(frames[i]))
        for i in shown
    ]
    return Markup('<svg class="hidden" width="0" height="0" aria-hidden="true">{}</svg>').format(
        Markup("").join(symbols)
    )


def plain_frame(index: int, height: float) -> Markup:
    """Return the frame alone, in a drawing 100 wide and `height` high."""
    return Markup(
        '<svg class="frame" viewBox="0 0 100 {}" role="img" aria-label="frame {}">'
        '<use href="#frame-{}" width="100" height="{}"/></svg>'
    ).format(height, index, index, height)


def upsampled(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Upsample a tile mask `[gh, gw]` by the dialect's nearest rule: cell floor(y * gh / height)."""
    rows = np.arange(size[0]) * mask.shape[0] // size[0]
    columns = np.arange(size[1]) * mask.shape[1] // size[1]
    return mask[rows][:, columns]


def mean_mask(step: StepStats) -> np.ndarray | None:
    """Return the mean over gates of the tile masks of one frame, 0 to 1; None without tiles.

    Grids that differ are compared on their least common multiple, so that no cell is split.
    """
    masks = [np.asarray(gate.tile_mask, dtype=float) for gate in step.gates.values() if gate.tile_mask]
    if not masks:
        return None
    height = min(math.lcm(*(mask.shape[0] for mask in masks)), MAX_GRID)
    width = min(math.lcm(*(mask.shape[1] for mask in masks)), MAX_GRID)
    return np.mean([upsampled(mask, (height, width)) for mask in masks], axis=0)


def _colour(share: float) -> str:
    red, green, blue = (BLUE + (RED - BLUE) * share).round().astype(int)
    return f"rgb({red} {green} {blue})"


def _runs(row: np.ndarray, level: int) -> list[tuple[int, int]]:
    """Return begin and length of the runs of `level` in `row`."""
    padded = np.concatenate([[False], row == level, [False]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(padded))
    return [(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _drawing(body: Markup, height: float, title: str) -> Markup:
    return Markup(
        '<svg class="frame" viewBox="0 0 100 {}" role="img" aria-label="{}"><title>{}</title>{}</svg>'
    ).format(height, title, title, body)


def _cells(levels: np.ndarray, level: int, height: float) -> str:
    """Return the path of the cells of `level`, in a drawing 100 wide: one rectangle a run."""
    cell_h, cell_w = height / levels.shape[0], 100 / levels.shape[1]
    return "".join(
        f"M{a * cell_w:.4g} {y * cell_h:.4g}h{n * cell_w:.4g}v{cell_h:.4g}h-{n * cell_w:.4g}z"
        for y, row in enumerate(levels)
        for a, n in _runs(row, level)
    )


def left_of_frame(left: np.ndarray, index: int | None, height: float, title: str, name: str) -> Markup:
    """Return the tokens that are left, bool `[rows, columns]`, of frame `index`, or alone where that is None.

    They keep their colours inside a red line, and the others are faded and grey: a tint would be lost on a colourful
    frame. `name` is the drawing's own on the page.
    """
    path = _cells(left.astype(int), 1, height)
    if index is None:
        drawn = Markup('<path class="left alone" d="{}"/>').format(path)
    else:
        drawn = Markup(
            '<clipPath id="{0}"><path d="{1}"/></clipPath><use class="faded" href="#frame-{2}" width="100" '
            'height="{3}"/><use href="#frame-{2}" width="100" height="{3}" clip-path="url(#{0})"/>'
            '<path class="left" d="{1}"/>'
        ).format(name, path, index, height)
    return _drawing(drawn, height, title)


def mask_over_frame(mask: np.ndarray, index: int | None, height: float, title: str) -> Markup:
    """Return the mask (values 0 to 1) over frame `index`, or alone where that is None.

    One path a level of the mask keeps the page small where there are many gates.
    """
    levels = np.rint(mask * LEVELS).astype(int)
    paths = []
    for level in np.unique(levels):
        path = _cells(levels, level, height)
        paths.append(Markup('<path fill="{}" d="{}"/>').format(_colour(level / LEVELS), path))
    under = Markup("")
    if index is not None:
        under = Markup('<use href="#frame-{}" width="100" height="{}"/>').format(index, height)
    style = "overlay" if index is not None else "overlay alone"
    cover = Markup('<g class="{}">{}</g>').format(style, Markup("").join(paths))
    return _drawing(under + cover, height, title)
