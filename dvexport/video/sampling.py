"""Which frames of a video a clip takes: places by count, by time, and densely."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from dvexport.video.preprocess import Preprocess

__all__ = ["clip_positions", "dense_positions", "sample_positions", "time_positions"]

_JITTER = Fraction(1, 4)
"""Containers round times, to a millisecond at worst: a quarter of a period at up to 250 frames a second."""


def clip_positions(times: Sequence[Fraction], preprocess: Preprocess) -> list[list[int]]:
    """Return for each of `preprocess.clips` clips the indices of its frames.

    Args:
        times: seconds of every frame of the video, ascending, at least one.
    """
    if preprocess.sampling == "uniform":
        return [time_positions(times, preprocess.frames)]
    ends = preprocess.sampling == "dense_to_ends"
    return dense_positions(len(times), preprocess.frames, preprocess.stride, preprocess.clips, to_ends=ends)


def sample_positions(total: int, frames: int) -> list[int]:
    """Return the index of the centre frame of each of `frames` equal segments of `total` frames.

    The deterministic test-time sampling of TSN: floor((i + 1/2) * total / frames).
    """
    return [(2 * i + 1) * total // (2 * frames) for i in range(frames)]


def time_positions(times: Sequence[Fraction], frames: int) -> list[int]:
    """Return the index of the frame shown in the middle of each of `frames` equal spans of time.

    At a constant frame rate these are `sample_positions`, which rounded times can't move. At a variable
    one a frame that is shown for long may come twice.
    """
    total = len(times)
    gaps = sorted(after - before for before, after in pairwise(times))
    if not gaps:
        return sample_positions(total, frames)
    period = gaps[len(gaps) // 2]
    if period <= 0 or all(abs(gap - period) <= period * _JITTER for gap in gaps):
        return sample_positions(total, frames)
    length = times[-1] - times[0] + period
    middles = (times[0] + length * Fraction(2 * i + 1, 2 * frames) for i in range(frames))
    return [max(0, bisect_right(times, middle) - 1) for middle in middles]


def dense_positions(total: int, frames: int, stride: int, clips: int, *, to_ends: bool) -> list[list[int]]:
    """Return the indices of the frames of `clips` clips of `frames` frames, `stride` apart.

    Args:
        total: frames of the video, at least 1.
        to_ends: as VideoMAE's test does: every `stride`-th frame is kept, the first clip begins at the first
            kept one, the last ends at the last, and a video that is too short repeats its last. One clip is
            the first. Otherwise as MMAction2's SampleFrames does for Video-Swin: clips lie in the middle of
            equal parts, and a video that is too short starts again.
    """
    if to_ends:
        kept = list(range(0, total, stride))
        kept += kept[-1:] * (frames - len(kept))
        room = len(kept) - frames
        starts = [room * clip // (clips - 1) if clips > 1 else 0 for clip in range(clips)]
        return [kept[start : start + frames] for start in starts]
    room = max(total - frames * stride + 1, 0)
    starts = [(2 * clip + 1) * room // (2 * clips) for clip in range(clips)]
    return [[(start + i * stride) % total for i in range(frames)] for start in starts]
