"""Pictures of what a model gives for each frame: maps laid over the frame, boxes drawn on it."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dvexport.errors import UsageError
from dvexport.ports import Output
from dvexport.run.classes import label_of
from dvexport.run.run import RunResult

__all__ = ["LEAST_SCORE", "colour", "draw_boxes", "draw_map", "write_pictures"]

LEAST_SCORE = 0.5
"""Boxes with a lower score, a probability or what a sigmoid makes of it, are not drawn."""
_COVER = 0.5
"""Share of a map's colour in the picture."""


def colour(index: int) -> tuple[int, int, int]:
    """Return the RGB colour of a class; the first is no colour of its own, since it mostly is the background."""
    if index == 0:
        return (0, 0, 0)
    red, green, blue = colorsys.hsv_to_rgb((index - 1) * 0.381966 % 1, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_map(image: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return a frame with a map over it, uint8 `[H, W, 3]`.

    Args:
        image: uint8 `[H, W, 3]`.
        scores: `[channels, h, w]`: the greatest channel is the class; of one channel the sign.
    """
    classes = scores.argmax(0) if len(scores) > 1 else (scores[0] > 0).astype(np.int64)
    palette = np.array([colour(i) for i in range(max(2, len(scores)))], np.uint8)
    size = (image.shape[1], image.shape[0])
    over = Image.fromarray(palette[classes]).resize(size, Image.Resampling.NEAREST)
    drawn = Image.blend(Image.fromarray(image), over, _COVER)
    shown = np.asarray(Image.fromarray((classes > 0).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) > 0
    return np.where(shown[..., None], np.asarray(drawn), image)


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, scores: np.ndarray | None, labels: Sequence[str] = ()
) -> np.ndarray:
    """Return a frame with the boxes on it, uint8 `[H, W, 3]`.

    Args:
        image: uint8 `[H, W, 3]`.
        boxes: `[K, 4]`, left, top, right and bottom in pixels of the frame.
        scores: `[K, classes]`; without them every box is drawn.
        labels: the names of the classes.
    """
    drawn = Image.fromarray(image)
    pen = ImageDraw.Draw(drawn)
    for index, box in enumerate(boxes):
        best, told = 0, ""
        if not np.isfinite(box).all():
            continue
        if scores is not None and index < len(scores):
            best = int(scores[index].argmax())
            chance = float(scores[index][best])
            if chance < LEAST_SCORE:
                continue
            told = f"{label_of(labels, best)} {chance:.2f}"
        left, top, right, bottom = (float(side) for side in box)
        pen.rectangle(
            (min(left, right), min(top, bottom), max(left, right), max(top, bottom)), outline=colour(best + 1)
        )
        if told:
            pen.text((min(left, right) + 2, min(top, bottom) + 1), told, fill=colour(best + 1))
    return np.asarray(drawn)


def write_pictures(result: RunResult, folder: str | Path) -> list[Path]:
    """Write one PNG a frame of every map and of the boxes into a folder; return the files.

    Raises:
        UsageError: the model gives neither maps nor boxes, or the folder can't be written.
    """
    assert result.images is not None, "run with images=True"
    maps = [output for output in result.declared if output.kind == "map"]
    boxes = [output for output in result.declared if output.kind == "boxes"]
    if not maps and not boxes:
        told = ", ".join(f"{output.name} is of kind {output.kind}" for output in result.declared)
        raise UsageError(
            "there is nothing to draw: the model gives no maps and no boxes",
            why=told,
            hint="declare what an output is at export, such as --kind masks=map; --output writes arrays",
        )
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return [path for one in (*maps, *boxes) for path in _written(result, one, Path(folder))]
    except OSError as error:
        raise UsageError("the pictures can't be written", where=str(folder), why=error.strerror) from error


def _written(result: RunResult, output: Output, folder: Path) -> list[Path]:
    assert result.images is not None
    paths = []
    scores = next((one for one in result.declared if one.kind == "scores"), None)
    for i, value in enumerate(result.outputs[output.name]):
        image = result.images[i - len(result.outputs[output.name])]  # for a clip read as one: the last frame
        if output.kind == "map":
            picture = draw_map(image, value)
        else:
            given = None if scores is None else result.outputs[scores.name][i]
            picture = draw_boxes(image, value, given, () if scores is None else scores.labels)
        paths.append(folder / f"{output.name}-{i:04d}.png")
        Image.fromarray(picture).save(paths[-1])
    if output.kind == "map" and output.labels:
        _legend(output, folder)
    return paths


def _legend(output: Output, folder: Path) -> None:
    """Write which colour is which class."""
    lines = [f"#{''.join(f'{part:02x}' for part in colour(i))} {label}" for i, label in enumerate(output.labels)]
    (folder / f"{output.name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
