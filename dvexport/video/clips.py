"""Video in and out: files, folders of images and cameras, sampled and normalised as a model's training did.

Frames become RGB at their own size and are scaled then, by swscale's bilinear filter, whose support
grows with the reduction: within one grey level of Pillow's, which the official TSN family of models
was trained through (scaling in YUV would be 1 to 3 off on average). The bit-exact variant is asked
for, so a clip gives the same numbers on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation

from dvexport.errors import ClipError, UsageError
from dvexport.files import atomic_write
from dvexport.video.limits import FRAME_RATE, MAX_PIXELS
from dvexport.video.preprocess import Preprocess
from dvexport.video.sampling import clip_positions, sample_positions
from dvexport.video.sources import decode, is_camera

__all__ = ["Clip", "Frame", "read_clip", "read_views", "sample_positions", "stream_frames", "write_clip"]

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
        positions: which frames of the video these are, where they were sampled from a whole one.
        length: frames of that video.
    """

    frames: np.ndarray
    images: np.ndarray
    times: list[float]
    positions: tuple[int, ...] = ()
    length: int = 0

    @classmethod
    def of(cls, frames: list[Frame], positions: Sequence[int] = (), length: int = 0) -> Clip:
        """Stack `frames`, at least one."""
        return cls(
            np.stack([frame.tensor for frame in frames]),
            np.stack([frame.image for frame in frames]),
            [frame.time for frame in frames],
            tuple(positions),
            length,
        )


def read_clip(path: str | Path, preprocess: Preprocess) -> Clip:
    """Read `preprocess.frames` frames of the video at `path`, for clip mode.

    Where preprocessing has several clips and crops, it is the centre crop of the middle clip.

    Raises:
        ClipError: the file is missing, no video, without frames, of a size that no clip has, has too few
            frames for uniform sampling, or is a camera, which has no length.
    """
    positions, length = _positions(path, preprocess)
    middle = positions[len(positions) // 2]
    return _read(path, preprocess, [middle], length, [Fraction(1, 2)])[0]


def read_views(path: str | Path, preprocess: Preprocess) -> list[Clip]:
    """Read all clips and crops that `preprocess` has of the video at `path`: the crops of the first clip first.

    Raises:
        ClipError: as `read_clip`.
    """
    shares = [Fraction(1, 2)] if preprocess.crops == 1 else [Fraction(i, 2) for i in range(3)]
    return _read(path, preprocess, *_positions(path, preprocess), shares)


def _positions(path: str | Path, preprocess: Preprocess) -> tuple[list[list[int]], int]:
    """Return the frames of each clip, and how many the video has.

    The video is decoded, since what containers say of it is not to be trusted.
    """
    if is_camera(path):
        raise ClipError("a camera has no length to take a clip from", where=str(path),
                        hint="record a video; a camera needs a bundle of stream mode")  # fmt: skip
    times = [time for _, time in _timed(decode(path))]
    if preprocess.sampling == "uniform" and len(times) < preprocess.frames:
        raise ClipError(
            f"the video has {len(times)} frames, the model needs {preprocess.frames}",
            where=str(path),
            hint="give a longer video, or export with --set frames=N (its accuracy may change)",
        )
    return clip_positions(times, preprocess), len(times)


def _read(
    path: str | Path,
    preprocess: Preprocess,
    positions: Sequence[Sequence[int]],
    length: int,
    shares: Sequence[Fraction],
) -> list[Clip]:
    """Decode a second time and keep what some clip needs: a frame in two clips is prepared once."""
    wanted = {index for clip in positions for index in clip}
    last = max(wanted)
    kept: dict[int, list[Frame]] = {}
    for index, (frame, time) in enumerate(_timed(decode(path, warn=False))):
        if index in wanted:
            kept[index] = _prepared(frame, time, preprocess, shares)
        if index == last:
            break
    if len(kept) < len(wanted):
        raise ClipError("the video changed while it was read", where=str(path))
    return [
        Clip.of([kept[index][crop] for index in clip], clip, length)
        for clip in positions
        for crop in range(len(shares))
    ]


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
        ClipError: the file is missing, no video, or without frames; a camera can't be opened.
        UsageError: `frame_rate` is out of its range.
    """
    rate = frame_rate if frame_rate is not None else preprocess.frame_rate
    timed = _timed(decode(path))
    if rate is not None:
        if not FRAME_RATE[0] <= rate <= FRAME_RATE[1]:
            raise UsageError(f"a frame rate must be from {FRAME_RATE[0]} to {FRAME_RATE[1]}, not {rate}")
        timed = _at_rate(timed, Fraction(rate).limit_denominator(1001))
    for frame, time in islice(timed, limit):
        yield _prepared(frame, time, preprocess, [Fraction(1, 2)])[0]


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


def _prepared(frame: av.VideoFrame, time: Fraction, preprocess: Preprocess, shares: Sequence[Fraction]) -> list[Frame]:
    """Return a frame for each of `shares`: the place of the crop on the long side, 0 to 1."""
    upright = _upright(frame, preprocess)
    return [_normalised(_crop(upright, share, preprocess.size), time, preprocess) for share in shares]


def _normalised(image: np.ndarray, time: Fraction, preprocess: Preprocess) -> Frame:
    channels = image if preprocess.colour_order == "RGB" else image[..., ::-1]
    mean, std = (np.asarray(values, np.float32) for values in (preprocess.mean, preprocess.std))
    tensor = (channels.astype(np.float32) / np.float32(255) - mean) / std
    return Frame(np.ascontiguousarray(tensor.transpose(2, 0, 1)), image, float(time))


def _upright(frame: av.VideoFrame, preprocess: Preprocess) -> np.ndarray:
    """Scale the short side to `preprocess.resize`, but to cover the crop at least, and turn upright."""
    height, width = preprocess.size
    turns = round((getattr(frame, "rotation", 0) or 0) / 90) % 4
    sideways = turns % 2 == 1
    source = (frame.width, frame.height) if sideways else (frame.height, frame.width)
    scale = max(preprocess.resize / min(source), height / source[0], width / source[1])
    upright = (max(height, round(source[0] * scale)), max(width, round(source[1] * scale)))
    if upright[0] * upright[1] > MAX_PIXELS:
        why = f"{source[1]} x {source[0]} to {upright[1]} x {upright[0]} is more than {MAX_PIXELS} pixels"
        raise ClipError(
            "the frames become too large when they are scaled", where=f"resize={preprocess.resize}", why=why
        )
    scaled = upright[::-1] if sideways else upright
    rgb = frame.reformat(format="rgb24", interpolation=_BILINEAR, threads=1)
    rgb = rgb.reformat(width=scaled[1], height=scaled[0], interpolation=_BILINEAR, threads=1)
    return np.rot90(rgb.to_ndarray(), turns)


def _crop(image: np.ndarray, share: Fraction, size: tuple[int, int]) -> np.ndarray:
    """Cut out `size`, at `share` of what is left of the long side and in the middle of the short one."""
    extra = (image.shape[0] - size[0], image.shape[1] - size[1])
    places = (share, Fraction(1, 2)) if image.shape[0] > image.shape[1] else (Fraction(1, 2), share)
    top, left = (int(room * place) for room, place in zip(extra, places, strict=True))
    return np.ascontiguousarray(image[top : top + size[0], left : left + size[1]])
