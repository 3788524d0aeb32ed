"""What a bundle predicts for a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dvexport.errors import ClipError
from dvexport.run.open import open_session
from dvexport.run.session import Step
from dvexport.video.clips import read_clip, stream_frames

if TYPE_CHECKING:
    from dvexport.bundle.archive import Bundle

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


def run(bundle: Bundle, clip: str | Path, threads: int = 1) -> RunResult:
    """Classify the video at `clip`: in stream mode all frames at the model's rate, in clip mode T of them.

    Raises:
        ClipError: the video can't be read, or has too few frames.
        UsageError, DeviceError: as `open_session`.
    """
    session = open_session(bundle, threads=threads)
    preprocess = bundle.manifest.preprocess
    steps: list[Step] = []
    times: list[float] = []
    if session.mode == "clip":
        sampled = read_clip(clip, preprocess)
        steps, times = session.run_clip(sampled.frames), sampled.times
        if session.whole_clip:
            times = times[-1:]
    else:
        for frame in stream_frames(clip, preprocess):
            steps.append(session.step(frame.tensor[None]))
            times.append(frame.time)
    if not steps:
        raise ClipError("the video has no frames", where=str(clip))
    return _result(steps, times, session.labels)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the softmax of `logits` `[classes]`."""
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    return shifted / shifted.sum()


def label_of(labels: Sequence[str], index: int) -> str:
    """Return the name of a class, its number where it has none."""
    return labels[index] if index < len(labels) else f"class {index}"


def _result(steps: Sequence[Step], times: Sequence[float], labels: Sequence[str]) -> RunResult:
    last = probabilities(steps[-1].logits)
    order = np.argsort(-last, kind="stable")[:TOP]
    frames = []
    for step, time in zip(steps, times, strict=True):
        chances = probabilities(step.logits)
        best = int(chances.argmax())
        frames.append(FramePrediction(time, label_of(labels, best), float(chances[best])))
    return RunResult([(label_of(labels, int(i)), float(last[i])) for i in order], frames)
