"""What a bundle gives for a video: classes of a classifier, and every output by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dvexport.errors import ClipError
from dvexport.ports import Output
from dvexport.run.classes import best_class, label_of, logits_output, probabilities
from dvexport.run.feeds import Feeds, by_name, read_arrays, with_arrays
from dvexport.run.open import open_session
from dvexport.run.session import Session, Step, stacked_outputs
from dvexport.video.clips import read_clip, stream_frames

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
        outputs: every output by name, frames first.
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
            return {"outputs": [asdict(one) for one in self.summaries()]}
        top = [{"label": label, "probability": probability} for label, probability in self.top]
        return {"top": top, "frames": [asdict(frame) for frame in self.frames]}


def run(
    bundle: Bundle,
    clip: str | Path,
    threads: int = 1,
    *,
    inputs: str | Path | Mapping[str, np.ndarray] | None = None,
    images: bool = False,
) -> RunResult:
    """Run a bundle on the video at `clip`: in stream mode all frames at the model's rate, in clip mode T of them.

    Args:
        inputs: the model's inputs beside the video, an .npz file or arrays by name, one row a frame.
        images: keep the frames that the model saw, for pictures.

    Raises:
        ClipError: the video can't be read, or has too few frames.
        UsageError: `inputs` do not fit the model or the video; and as `open_session`.
        DeviceError: as `open_session`.
    """
    given = read_arrays(inputs) if isinstance(inputs, str | Path) else inputs
    session = open_session(bundle, threads=threads)
    steps: list[Step] = []
    times: list[float] = []
    seen: list[np.ndarray] = []
    if session.mode == "clip":
        sampled = read_clip(clip, bundle.manifest.preprocess)
        steps, times = session.run_clip(with_arrays(sampled.frames, list(session.inputs), given, clip)), sampled.times
        seen = list(sampled.images)
        if session.whole_clip:
            times = times[-1:]
    else:
        for frame, feeds in _stream(bundle, clip, session, given):
            steps.append(session.step(feeds))
            times.append(frame.time)
            seen += [frame.image] if images else []
    if not steps:
        raise ClipError("the video has no frames", where=str(clip))
    return _result(steps, times, bundle.manifest.declared_outputs, np.stack(seen) if images else None)


def _stream(
    bundle: Bundle, clip: str | Path, session: Session, given: Mapping[str, np.ndarray] | None
) -> Iterator[tuple[Any, Feeds]]:
    """Yield each frame with every input of its step; inputs beside the video make it be read before the first step."""
    frames = stream_frames(clip, bundle.manifest.preprocess)
    names = list(session.inputs)
    if len(names) == 1 and not given:
        yield from ((frame, by_name(frame.tensor[None], names[0])) for frame in frames)
        return
    read = list(frames)
    if not read:
        return
    feeds = with_arrays(np.stack([frame.tensor for frame in read]), names, given, clip)
    for i, frame in enumerate(read):
        yield frame, {name: array[i : i + 1] for name, array in feeds.items()}


def _result(
    steps: Sequence[Step], times: Sequence[float], declared: Sequence[Output], images: np.ndarray | None
) -> RunResult:
    outputs = stacked_outputs(steps)
    classifier = logits_output(declared)
    if classifier is None:
        return RunResult([], [], outputs, times, declared, images)
    last = probabilities(steps[-1].outputs[classifier.name])
    order = np.argsort(-last, kind="stable")[:TOP]
    frames = []
    for step, time in zip(steps, times, strict=True):
        best = best_class(step, declared)
        assert best is not None
        frames.append(FramePrediction(time, *best))
    top = [(label_of(classifier.labels, int(i)), float(last[i])) for i in order]
    return RunResult(top, frames, outputs, times, declared, images)
