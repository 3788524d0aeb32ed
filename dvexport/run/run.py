"""What a bundle predicts for a video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dvexport.errors import UsageError
from dvexport.run.open import open_session
from dvexport.run.session import Session
from dvexport.video.clips import read_views, stream_frames
from dvexport.video.sources import is_camera

if TYPE_CHECKING:
    from dvexport.bundle.archive import Bundle
    from dvexport.video.preprocess import Preprocess

__all__ = ["TOP", "FramePrediction", "RunResult", "label_of", "probabilities", "run"]

TOP = 5
"""Classes reported for a clip."""


@dataclass(frozen=True)
class FramePrediction:
    """The best class after a frame: the consensus over it and all before."""

    time: float
    label: str
    probability: float


@dataclass(frozen=True)
class RunResult:
    """The prediction for a clip.

    Attributes:
        top: label and probability of up to five classes, the most probable first.
        frames: the best class after every frame, with its time in seconds; only after the last one where the model
            reads the clip as one.
    """

    top: list[tuple[str, float]]
    frames: list[FramePrediction]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        top = [{"label": label, "probability": probability} for label, probability in self.top]
        return {"top": top, "frames": [asdict(frame) for frame in self.frames]}


def run(
    bundle: Bundle,
    clip: str | Path,
    threads: int = 1,
    limit: int | None = None,
    seen: Callable[[FramePrediction], None] | None = None,
) -> RunResult:
    """Classify a video: in stream mode all frames at the model's rate, in clip mode T of them.

    Where preprocessing takes several clips or crops, their probabilities are averaged, as VideoMAE's and
    Video-Swin's tests do, and `frames` has the average alone.

    Args:
        clip: a video file, a folder of numbered images, or `camera:0`, which ends with `limit` or Ctrl-C.
        limit: frames of a stream to read at most.
        seen: called after each frame of a stream.

    Raises:
        ClipError: the video can't be read, or has too few frames.
        UsageError, DeviceError: as `open_session`; `limit` with a bundle that reads clips.
    """
    session = open_session(bundle, threads=threads)
    preprocess = bundle.manifest.preprocess
    if session.mode != "clip":
        return _stream(session, clip, preprocess, limit, seen)
    if limit is not None:
        raise UsageError("this bundle reads clips of a fixed length", hint="leave out --frames")
    rows, times = [], []
    for view in read_views(clip, preprocess):
        rows.append(np.stack([probabilities(step.logits) for step in session.run_clip(view.frames)]))
        times = view.times
    if session.whole_clip or len(rows) > 1:
        rows, times = [row[-1:] for row in rows], times[-1:]
    mean = np.mean(rows, axis=0)
    frames = [_best(time, row, session.labels) for time, row in zip(times, mean, strict=True)]
    return RunResult(_top(mean[-1], session.labels), frames)


def _stream(
    session: Session,
    clip: str | Path,
    preprocess: Preprocess,
    limit: int | None,
    seen: Callable[[FramePrediction], None] | None,
) -> RunResult:
    frames: list[FramePrediction] = []
    last = np.zeros(0)
    try:
        for frame in stream_frames(clip, preprocess, limit=limit):
            last = probabilities(session.step(frame.tensor[None]).logits)
            frames.append(_best(frame.time, last, session.labels))
            if seen is not None:
                seen(frames[-1])
    except KeyboardInterrupt:
        # A camera has no other end; a file that is interrupted has no result.
        if not is_camera(clip) or not frames:
            raise
    return RunResult(_top(last, session.labels), frames)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the softmax of `logits` `[classes]`."""
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    return shifted / shifted.sum()


def label_of(labels: Sequence[str], index: int) -> str:
    """Return the name of a class, its number where it has none."""
    return labels[index] if index < len(labels) else f"class {index}"


def _top(chances: np.ndarray, labels: Sequence[str]) -> list[tuple[str, float]]:
    order = np.argsort(-chances, kind="stable")[:TOP]
    return [(label_of(labels, int(i)), float(chances[i])) for i in order]


def _best(time: float, chances: np.ndarray, labels: Sequence[str]) -> FramePrediction:
    best = int(chances.argmax())
    return FramePrediction(time, label_of(labels, best), float(chances[best]))
