"""What a bundle gives for a video: classes of a classifier, and every output by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dvexport.errors import ClipError, UsageError
from dvexport.ports import Output
from dvexport.run.classes import best_class, label_of, logits_output, probabilities
from dvexport.run.feeds import Feeds, by_name, read_arrays, with_arrays
from dvexport.run.finite import check_finite
from dvexport.run.open import open_session
from dvexport.run.session import Session, Step, stacked_outputs
from dvexport.video.clips import read_views, stream_frames
from dvexport.video.sources import is_camera

if TYPE_CHECKING:
    from dvexport.bundle.archive import Bundle

__all__ = ["TOP", "FramePrediction", "OutputSummary", "RunResult", "run"]

TOP = 5
"""Classes reported for a clip."""


@dataclass(frozen=True)
class FramePrediction:
    """The best class after a frame: the consensus over it and all before."""

    time: float
    label: str
    probability: float


@dataclass(frozen=True)
class OutputSummary:
    """An output in short: its name, kind, shape with the frames first, and its least, mean and greatest value."""

    name: str
    kind: str
    shape: tuple[int, ...]
    min: float
    mean: float
    max: float


@dataclass(frozen=True)
class RunResult:
    """What a model gives for a clip.

    Attributes:
        top: label and probability of up to five classes, the most probable first; empty for a model that is no
            classifier.
        frames: the best class after every frame, with its time in seconds; only after the last one where the model
            reads the clip as one. Empty for a model that is no classifier.
        outputs: every output by name, frames first; those of several clips or crops one after another. A camera
            without a limit leaves those of its last frame.
        times: the time of each frame, in seconds; a single one where the model reads the clip as one.
        declared: what the outputs mean.
        images: the frames that the model saw, uint8 `[T, H, W, 3]` RGB, where they were asked for.
    """

    top: list[tuple[str, float]]
    frames: list[FramePrediction]
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    times: Sequence[float] = ()
    declared: Sequence[Output] = ()
    images: np.ndarray | None = None

    def summaries(self) -> list[OutputSummary]:
        """Return every output in short."""
        kinds = {output.name: output.kind for output in self.declared}
        return [
            OutputSummary(
                name, kinds.get(name, "array"), tuple(value.shape),
                float(value.min()), float(value.mean()), float(value.max()),
            )
            for name, value in self.outputs.items()
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: classes of a classifier, and for others their outputs in short."""
        if not self.frames:
            known = [asdict(one) for one in self.summaries()]
            return {"outputs": [{key: _json_number(value) for key, value in one.items()} for one in known]}
        top = [{"label": label, "probability": probability} for label, probability in self.top]
        return {"top": top, "frames": [asdict(frame) for frame in self.frames]}


def _json_number(value: Any) -> Any:
    """Return None for a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run(
    bundle: Bundle,
    clip: str | Path,
    threads: int = 1,
    *,
    inputs: str | Path | Mapping[str, np.ndarray] | None = None,
    images: bool = False,
    limit: int | None = None,
    tell: Callable[[FramePrediction], None] | None = None,
) -> RunResult:
    """Run a bundle on a video: in stream mode all frames at the model's rate, in clip mode T of them.

    Where preprocessing takes several clips or crops, a classifier's probabilities are averaged, as VideoMAE's and
    Video-Swin's tests do, and `frames` has the average alone.

    Args:
        clip: a video file, a folder of numbered images, or `camera:0`, which ends with `limit` or Ctrl-C.
        inputs: the model's inputs beside the video, an .npz file or arrays by name, one row a frame.
        images: keep the frames that the model saw, for pictures.
        limit: frames of a stream to read at most.
        tell: called after each frame of a stream with a classifier's best class.

    Raises:
        ClipError: the video can't be read, or has too few frames.
        BundleError: an output has NaN or infinite values.
        UsageError: `inputs` do not fit the model or the video; `limit` for a bundle that reads clips; several clips or
            crops for a model that is no classifier of a video alone; and as `open_session`.
        DeviceError: as `open_session`.
    """
    given = read_arrays(inputs) if isinstance(inputs, str | Path) else inputs
    session = open_session(bundle, threads=threads)
    seen = _Seen(bundle.manifest.declared_outputs)
    if session.mode == "clip":
        if limit is not None:
            raise UsageError("this bundle reads clips of a fixed length", hint="leave out --frames")
        return _clips(seen, session, bundle, clip, given, images)
    endless = is_camera(clip) and limit is None
    try:
        for index, (frame, feeds) in enumerate(_stream(bundle, clip, session, given, limit)):
            step = session.step(feeds)
            check_finite(bundle, step, index, feeds)
            seen.add(step, frame.time, frame.image if images else None, alone=endless)
            if tell is not None and seen.frames:
                tell(seen.frames[-1])
    except KeyboardInterrupt:
        # A camera has no other end; a file that is interrupted has no result.
        if not is_camera(clip) or not seen.steps:
            raise
    if not seen.steps:
        raise ClipError("the video has no frames", where=str(clip))
    return seen.result(seen.top())


class _Seen:
    """What a run has given so far: steps, their times, and the best class after each."""

    def __init__(self, declared: Sequence[Output]) -> None:
        self.declared, self.classifier = declared, logits_output(declared)
        self.steps: list[Step] = []
        self.times: list[float] = []
        self.images: list[np.ndarray] = []
        self.frames: list[FramePrediction] = []

    def add(self, step: Step, time: float, image: np.ndarray | None, *, alone: bool = False) -> None:
        """Take a step along; `alone`: in the place of those before, of which only the best classes stay."""
        if alone:
            self.steps, self.times, self.images = [], [], []
        self.steps.append(step)
        self.times.append(time)
        self.images += [] if image is None else [image]
        best = best_class(step, self.declared)
        self.frames += [] if best is None else [FramePrediction(time, *best)]

    def chances(self, step: Step) -> np.ndarray:
        """Return a classifier's probabilities `[classes]` after a step."""
        assert self.classifier is not None
        return probabilities(step.outputs[self.classifier.name])

    def top(self, chances: np.ndarray | None = None) -> list[tuple[str, float]]:
        """Return the most probable classes, after the last step unless `chances` are given; none without classes."""
        if self.classifier is None:
            return []
        given = self.chances(self.steps[-1]) if chances is None else chances
        order = np.argsort(-given, kind="stable")[:TOP]
        return [(label_of(self.classifier.labels, int(i)), float(given[i])) for i in order]

    def result(self, top: list[tuple[str, float]]) -> RunResult:
        """Return all of it."""
        images = np.stack(self.images) if self.images else None
        return RunResult(top, self.frames, stacked_outputs(self.steps), self.times, self.declared, images)


def _clips(
    seen: _Seen,
    session: Session,
    bundle: Bundle,
    clip: str | Path,
    given: Mapping[str, np.ndarray] | None,
    images: bool,
) -> RunResult:
    """Run every clip and crop that preprocessing takes; of several, the averaged probabilities are the result."""
    views = read_views(clip, bundle.manifest.preprocess)
    if len(views) > 1 and (seen.classifier is None or len(session.inputs) > 1):
        raise UsageError("only a classifier of a video alone takes several clips or crops", where=str(clip))
    for view in views:
        feeds = with_arrays(view, list(session.inputs), given, clip)
        steps = session.run_clip(feeds)
        for index, step in enumerate(steps):
            check_finite(bundle, step, index, feeds)
        times = view.times[-len(steps) :]  # one step where the model reads a clip as one
        for step, time in zip(steps, times, strict=True):
            seen.add(step, time, None)
        seen.images += list(view.images) if images else []
    if len(views) == 1:
        return seen.result(seen.top())
    last = len(seen.steps) // len(views)
    mean = np.mean([seen.chances(step) for step in seen.steps[last - 1 :: last]], axis=0)
    top = seen.top(mean)
    seen.frames = [FramePrediction(views[-1].times[-1], *top[0])]
    return seen.result(top)


def _stream(
    bundle: Bundle, clip: str | Path, session: Session, given: Mapping[str, np.ndarray] | None, limit: int | None
) -> Iterator[tuple[Any, Feeds]]:
    """Yield each frame with every input of its step; inputs beside the video make it be read before the first step."""
    frames = stream_frames(clip, bundle.manifest.preprocess, limit=limit)
    names = list(session.inputs)
    if len(names) == 1 and not given:
        yield from ((frame, by_name(frame.tensor[None], names[0])) for frame in frames)
        return
    if is_camera(clip) and limit is None:
        raise UsageError("a camera needs an end where the model takes more than a video", hint="--frames N")
    read = list(frames)
    if not read:
        return
    feeds = with_arrays(np.stack([frame.tensor for frame in read]), names, given, clip)
    for i, frame in enumerate(read):
        yield frame, {name: array[i : i + 1] for name, array in feeds.items()}
