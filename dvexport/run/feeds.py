"""What is fed to a model: arrays by the name of their input, frames first; or the video alone, as one array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dvexport.errors import UsageError
from dvexport.files import check_file
from dvexport.ports import VIDEO

if TYPE_CHECKING:
    from dvexport.video.clips import Clip

__all__ = ["Feeds", "Given", "at", "by_name", "count", "read_arrays", "with_arrays"]

Feeds = dict[str, np.ndarray]
Given = np.ndarray | Mapping[str, np.ndarray]
"""What callers give: every input by its name, or an array for a model that takes a video alone."""


def by_name(given: Given, name: str = VIDEO) -> Feeds:
    """Return what was given by name; an array alone is that of the input `name`."""
    return dict(given) if isinstance(given, Mapping) else {name: given}


def at(given: Given, frames: int | slice | np.ndarray) -> Any:
    """Return some frames of every array, in the form in which they were given."""
    return {name: array[frames] for name, array in given.items()} if isinstance(given, Mapping) else given[frames]


def count(given: Given) -> int:
    """Return the number of frames."""
    return len(next(iter(given.values())) if isinstance(given, Mapping) else given)


def read_arrays(path: str | Path) -> Feeds:
    """Return the arrays of an .npz file by name; UsageError if it is none, or holds Python objects."""
    try:
        check_file(path)
        with np.load(path, allow_pickle=False) as stored:
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array without a name")
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # NumPy, zipfile, zlib and tokenize each have their own for a damaged file
        raise UsageError(
            "the inputs can't be read", where=str(path), why=str(error), hint="write them with numpy.savez"
        ) from None


def with_arrays(
    video: np.ndarray | Clip, names: Sequence[str], inputs: str | Path | Mapping[str, np.ndarray] | None, clip: object
) -> Feeds:
    """Return a video with the other inputs of a model.

    Args:
        video: frames of the first input. If they were sampled from a longer video, arrays with a row for every frame
            of that one are sampled alike.
        names: every input, the video first.
        inputs: an .npz file, or arrays by name, frames first, as many frames as the video has.
        clip: what the video is called in errors.

    Raises:
        UsageError: an input is missing or unknown, or has another number of frames.
    """
    given = {} if inputs is None else dict(inputs) if isinstance(inputs, Mapping) else read_arrays(inputs)
    missing, unknown = [name for name in names[1:] if name not in given], [name for name in given if name not in names]
    if missing:
        raise UsageError(
            f"the model needs the input '{missing[0]}' beside the video",
            where=str(clip),
            hint=f"give an .npz file of {', '.join(names[1:])}, one row a frame: --inputs FILE.npz",
        )
    if unknown or names[0] in given:
        name = unknown[0] if unknown else names[0]
        why = f"the model takes {', '.join(names)}" if unknown else "the clip gives it"
        raise UsageError(f"'{name}' is no input to give", where="--inputs", why=why)
    frames, positions, length = (video, (), 0) if isinstance(video, np.ndarray) else (
        video.frames, video.positions, video.length
    )  # fmt: skip
    for name, array in given.items():
        if array.ndim >= 1 and len(array) == length > len(frames):
            given[name] = array[list(positions)]
        elif array.ndim < 1 or len(array) != len(frames):
            every = f", or {length}, a row for every frame of the video" if length > len(frames) else ""
            raise UsageError(
                f"the input '{name}' must have {len(frames)} frames, as the clip has{every}",
                why=f"its shape is {list(array.shape)}",
                where=str(clip),
            )
    return {names[0]: frames, **{name: given[name] for name in names[1:]}}
