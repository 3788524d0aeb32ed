"""The frames that a profile runs on: a video's, or the bundle's golden ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dvexport.errors import ClipError, UsageError
from dvexport.profile.result import ClipInfo
from dvexport.run.feeds import Feeds, with_arrays

if TYPE_CHECKING:
    from dvexport.bundle.archive import Bundle
    from dvexport.video.preprocess import Preprocess

__all__ = ["MAX_FRAMES", "ProfileClip", "load_clip"]

MAX_FRAMES = 256
"""Frames of a video that a stream is profiled on, at most: they are held in memory."""


@dataclass(frozen=True)
class ProfileClip:
    """A clip decoded once: float32 `[T, 3, H, W]` for the model, uint8 `[T, H, W, 3]` RGB for pictures.

    Attributes:
        feeds: every input of the model by name, the frames among them.
    """

    info: ClipInfo
    frames: np.ndarray
    images: np.ndarray
    feeds: Feeds


def load_clip(
    bundle: Bundle, path: str | Path | None, inputs: str | Path | Mapping[str, np.ndarray] | None = None
) -> ProfileClip:
    """Return the video at `path` as the bundle's model sees it, or the golden frames for None.

    Raises:
        UsageError: `inputs`, those beside the video, do not fit the model or the video.
        ClipError: the video can't be read, or has too few frames.
        BundleError: the bundle's golden data can't be read.
    """
    preprocess, names = bundle.manifest.preprocess, [entry.name for entry in bundle.manifest.inputs]
    if path is None:
        if inputs is not None:
            raise UsageError("inputs are given without the video that they belong to", hint="give a clip too")
        golden = bundle.golden()
        frames, feeds = golden[names[0]], {name: golden[name] for name in names}
        return ProfileClip(ClipInfo("golden frames", len(frames)), frames, _images(frames, preprocess), feeds)
    from dvexport.video.clips import Clip, read_clip, stream_frames

    if bundle.manifest.mode == "clip":
        clip = read_clip(path, preprocess)
    else:
        read = list(stream_frames(path, preprocess, limit=MAX_FRAMES))
        if not read:
            raise ClipError("the video has no frames", where=str(path))
        clip = Clip.of(read)
    feeds = with_arrays(clip, names, inputs, path)
    info = ClipInfo(Path(path).name, len(clip.frames), _rate(clip.times))
    return ProfileClip(info, clip.frames, clip.images, feeds)


def _rate(times: list[float]) -> float | None:
    """Return frames a second from the median distance of frames."""
    distance = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    return round(1 / distance, 3) if distance > 0 else None


def _images(frames: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """Undo the normalisation."""
    mean, std = (np.asarray(values, np.float32) for values in (preprocess.mean, preprocess.std))
    levels = (frames.transpose(0, 2, 3, 1) * std + mean) * 255
    images = levels.round().clip(0, 255).astype(np.uint8)
    return images if preprocess.colour_order == "RGB" else np.ascontiguousarray(images[..., ::-1])
