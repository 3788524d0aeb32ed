"""Video in and out: any file PyAV opens, sampled and normalised as a model's training did.

Frames become RGB at their own size and are scaled then, by swscale's bilinear filter, whose support
grows with the reduction: within one grey level of Pillow's, which the official TSN family of models
was trained through (scaling in YUV would be 1 to 3 off on average). The bit-exact variant is asked
for, so a clip gives the same numbers on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation

from dvexport.errors import ClipError, UsageError
from dvexport.files import atomic_write
from dvexport.video.preprocess import Preprocess

__all__ = ["Clip", "Frame", "read_clip", "sample_positions", "stream_frames", "write_clip"]

_BILINEAR = (
    Interpolation.BILINEAR
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
_TIME_JITTER = Fraction(1, 10)
"""Containers round times; a frame this share of a period too early still counts as on time."""


@dataclass(frozen=True)
class Frame:
    """One frame as the model sees it.

    Attributes:
        tensor: float32 `[3, H, W]`, normalised, channels in the model's colour order.
        image: uint8 `[H, W, 3]`, RGB, the same crop before normalisation, for pictures.
        time: seconds since the first frame of the video.
    """

    tensor: np.ndarray
    image: np.ndarray
    time: float


@dataclass(frozen=True)
class Clip:
    """Frames of one video, in order.

    Attributes:
        frames: float32 `[T, 3, H, W]`, normalised.
        images: uint8 `[T, H, W, 3]`, RGB, the same crops before normalisation.
        times: seconds since the first frame of the video, one per frame.
    """

    frames: np.ndarray
    images: np.ndarray
    times: list[float]

    @classmethod
    def of(cls, frames: list[Frame]) -> Clip:
        """Stack `frames`, at least one."""
        return cls(
            np.stack([frame.tensor for frame in frames]),
            np.stack([frame.image for frame in frames]),
            [frame.time for frame in frames],
        )


def sample_positions(total: int, frames: int) -> list[int]:
    """Return the index of the centre frame of each of `frames` equal segments of `total` frames.

    The deterministic test-time sampling of TSN: floor((i + 1/2) * total / frames).
    """
    return [(2 * i + 1) * total // (2 * frames) for i in range(frames)]


def read_clip(path: str | Path, preprocess: Preprocess) -> Clip:
    """Read `preprocess.frames` frames of the video at `path`, for clip mode.

    The video is decoded twice, since what containers say of their length is not to be trusted.

    Raises:
        ClipError: the file is missing, no video, damaged, or has too few frames.
    """
    total = sum(1 for _ in _decode(path))
    if total < preprocess.frames:
        raise ClipError(
            f"the video has {total} frames, the model needs {preprocess.frames}",
            where=str(path),
            hint="give a longer video, or export with --set frames=N (its accuracy may change)",
        )
    wanted = set(sample_positions(total, preprocess.frames))
    times = _timed(_decode(path))
    return Clip.of([_prepared(f, t, preprocess) for i, (f, t) in enumerate(times) if i in wanted])


def stream_frames(
    path: str | Path,
    preprocess: Preprocess,
    frame_rate: float | None = None,
    limit: int | None = None,
) -> Iterator[Frame]:
    """Yield the frames of the video at `path` one by one, for stream mode.

    Args:
        frame_rate: frames a second to keep, by default the model's (`preprocess.frame_rate`); None
            there too keeps all. Frames are dropped, never repeated.
        limit: stop after so many frames.

    Raises:
        ClipError: the file is missing, no video or damaged.
    """
    rate = frame_rate if frame_rate is not None else preprocess.frame_rate
    timed = _timed(_decode(path))
    if rate is not None:
        timed = _at_rate(timed, Fraction(rate).limit_denominator(1001))
    for frame, time in islice(timed, limit):
        yield _prepared(frame, time, preprocess)


def write_clip(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Write `frames` as an mp4: H.264 where this FFmpeg can encode it, else MPEG-4 part 2.

    Args:
        frames: uint8 `[T, H, W, 3]`, RGB, T at least 1, height and width even.
        fps: frames a second.

    Raises:
        UsageError: the frames do not fit, or `path` can't be written.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) == 0:
        raise UsageError("frames of a clip must be uint8 [T, H, W, 3]", why=f"{frames.dtype} {frames.shape}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise UsageError("frames of a clip must have even sizes", why=f"they are {frames.shape[1:3]}")
    with atomic_write(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1001)
        if "libx264" in av.codecs_available:
            # One thread: the bytes must not depend on the number of cores.
            stream = container.add_stream("libx264", rate=rate, options={"crf": "16", "threads": "1"})
        else:
            stream = container.add_stream("mpeg4", rate=rate, options={"qscale": "2", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")))
        container.mux(stream.encode())


def _decode(path: str | Path) -> Iterator[av.VideoFrame]:
    """Yield the decoded frames of the first video stream, at least one."""
    # Checked first, so that nothing is taken for a URL that FFmpeg would fetch.
    if not Path(path).is_file():
        raise ClipError("there is no such video", where=str(path))
    empty = True
    with _explained(path), av.open(f"file:{path}") as container:
        if not container.streams.video:
            raise ClipError("the file has no video stream", where=str(path))
        for frame in container.decode(container.streams.video[0]):
            empty = False
            yield frame
    if empty:
        raise ClipError("the video has no frames", where=str(path))


@contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (av.FFmpegError, OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ClipError("the video can't be read", where=str(path), why=why) from error


def _timed(frames: Iterator[av.VideoFrame]) -> Iterator[tuple[av.VideoFrame, Fraction]]:
    """Add the time since the first frame in seconds; frames without one are a 25th of a second apart."""
    start: Fraction | None = None
    for index, frame in enumerate(frames):
        if frame.pts is None or frame.time_base is None:
            time = (start or Fraction(0)) + Fraction(index, 25)
        else:
            time = frame.pts * frame.time_base
        start = time if start is None else start
        yield frame, time - start


def _at_rate(
    timed: Iterator[tuple[av.VideoFrame, Fraction]], rate: Fraction
) -> Iterator[tuple[av.VideoFrame, Fraction]]:
    """Keep the first frame of each period of `1 / rate` seconds."""
    last = -1
    for frame, time in timed:
        period = int(time * rate + _TIME_JITTER)
        if period > last:
            last = period
            yield frame, time


def _prepared(frame: av.VideoFrame, time: Fraction, preprocess: Preprocess) -> Frame:
    image = _cropped(frame, preprocess)
    channels = image if preprocess.colour_order == "RGB" else image[..., ::-1]
    mean, std = (np.asarray(values, np.float32) for values in (preprocess.mean, preprocess.std))
    tensor = (channels.astype(np.float32) / np.float32(255) - mean) / std
    return Frame(np.ascontiguousarray(tensor.transpose(2, 0, 1)), image, float(time))


def _cropped(frame: av.VideoFrame, preprocess: Preprocess) -> np.ndarray:
    """Scale the short side to `preprocess.resize`, turn upright, and cut out the centre."""
    height, width = preprocess.size
    turns = round((getattr(frame, "rotation", 0) or 0) / 90) % 4
    sideways = turns % 2 == 1
    source = (frame.width, frame.height) if sideways else (frame.height, frame.width)
    scale = max(preprocess.resize / min(source), height / source[0], width / source[1])
    upright = (max(height, round(source[0] * scale)), max(width, round(source[1] * scale)))
    scaled = upright[::-1] if sideways else upright
    rgb = frame.reformat(format="rgb24", interpolation=_BILINEAR, threads=1)
    rgb = rgb.reformat(width=scaled[1], height=scaled[0], interpolation=_BILINEAR, threads=1)
    image = np.rot90(rgb.to_ndarray(), turns)
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])
