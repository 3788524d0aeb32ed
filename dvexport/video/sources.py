"""Where frames come from: a video file, a folder of numbered images, or a camera.

FFmpeg is handed an open file and never a name, so no name is a pattern, a playlist or an address for it.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import av

from dvexport.errors import ClipError
from dvexport.names import printable
from dvexport.video.limits import FORMATS, MAX_ASPECT, MAX_PIXELS

__all__ = ["decode", "is_camera"]

_LOG = logging.getLogger(__name__)
_OPTIONS = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none", "max_pixels": str(MAX_PIXELS)}
_CAMERA = re.compile(r"camera:(\d{1,3})")
_LISTS = {
    b"#EXTM3U": "an HLS playlist",
    b"ffconcat": "a list of files",
    b"<?xml": "an XML file",
    b"<MPD": "a DASH list",
}
_IMAGES = (".png", ".jpg", ".jpeg")
_NUMBERED = re.compile(r"(.*?)(\d+)(\.\w+)", re.DOTALL)
_ENDS = {"apng": b"IEND\xaeB`\x82", "png_pipe": b"IEND\xaeB`\x82", "gif": b";", "mjpeg": b"\xff\xd9"}
"""Last bytes of formats that say of their length nothing else, by demuxer."""
_SHORT = 1.0
"""Seconds that a video may end before its container says, which rounds and counts pauses."""


def is_camera(source: str | Path) -> bool:
    """Say whether `source` names a camera: `camera:0` is the first one."""
    return _CAMERA.fullmatch(str(source)) is not None


def decode(source: str | Path, *, warn: bool = True) -> Iterator[av.VideoFrame]:
    """Yield the frames of a video, a folder of numbered images, or a camera; at least one.

    What is cut off or damaged gives the frames it has, with one line of warning in the log.

    Args:
        warn: whether to write that line; False for a second reading.

    Raises:
        ClipError: there is no such video, it is no file, no video, has no frames, or frames of a size that
            no clip has.
    """
    if is_camera(source):
        yield from _checked(_camera(str(source)), source)
        return
    mode = _mode(source)
    if stat.S_ISDIR(mode):
        yield from _folder(Path(source), warn)
    elif stat.S_ISREG(mode):
        yield from _checked(_file(Path(source), warn), source)
    else:
        raise ClipError("the video is no regular file", where=printable(source),
                        why="a clip is read twice, and a pipe or device may never end",
                        hint="write it to a file first")  # fmt: skip


def _mode(source: str | Path) -> int:
    try:
        return os.stat(source).st_mode
    except (OSError, ValueError) as error:
        raise ClipError("there is no such video", where=printable(source)) from error


class _Reader:
    """What FFmpeg sees of an open file: no name, by which it would guess the format."""

    def __init__(self, file: BinaryIO) -> None:
        self.read: Callable[[int], bytes] = file.read
        self.seek: Callable[..., int] = file.seek
        self.tell: Callable[[], int] = file.tell


def _file(path: Path, warn: bool) -> Iterator[av.VideoFrame]:
    with _explained(path), path.open("rb") as file:
        start = file.read(8)
        ending = _ending(file)
        file.seek(0)
        for magic, what in _LISTS.items():
            if start.startswith(magic):
                raise ClipError(
                    "the file is no video", where=printable(path), why=f"it is {what}, which may name other files"
                )
        with av.open(_Reader(file), options=_OPTIONS) as container:
            if not container.streams.video:
                raise ClipError("the file has no video stream", where=printable(path))
            cut = not ending.endswith(_ENDS.get(container.format.name, b""))
            if container.format.name == "jpeg_pipe":
                cut = _jpeg_is_cut(path)
            yield from _whole(container, path, warn, "its end is missing" if cut else None)


def _ending(file: BinaryIO) -> bytes:
    """Return the last bytes of a file, without what writers fill up with."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 64))
    return file.read().rstrip(b"\0\r\n")


def _jpeg_is_cut(path: Path) -> bool:
    """Say whether the last scan of a JPEG has no end: cameras may write other things after it."""
    with path.open("rb") as file:
        data = file.read(4 * MAX_PIXELS)
    return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")


def _whole(container: Any, path: Path, warn: bool, damage: str | None) -> Iterator[av.VideoFrame]:
    """Yield what can be decoded, and warn if that is less than the container promises."""
    stream = container.streams.video[0]
    _check_size(stream.codec_context.width, stream.codec_context.height, path)
    frames = packets = 0
    last: float | None = None
    error: av.FFmpegError | None = None
    # Sound may be longer than the pictures: the end of anything is what the container's length is held against.
    demuxed = container.demux()
    while True:
        try:
            packet = next(demuxed, None)
        except av.FFmpegError as failure:
            error, damage = failure, failure.strerror
            break
        if packet is None:
            break
        if packet.pts is not None and packet.time_base is not None:
            last = max(last or 0.0, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index != stream.index:
            continue
        packets += packet.size > 0
        try:
            decoded = packet.decode()
        except av.FFmpegError as failure:
            error, damage = failure, failure.strerror
            continue
        for frame in decoded:
            if packet.is_corrupt or frame.is_corrupt:
                damage = "a frame is incomplete"
            frames += 1
            yield frame
    if frames == 0 and error is not None:
        raise error
    damage = damage or _missing(container, stream, packets, last)
    if warn and frames and damage:
        _LOG.warning(
            "warning: the video is cut off or damaged (%s); its %d frames are taken: %s",
            damage,
            frames,
            printable(path),
        )


def _missing(container: Any, stream: Any, packets: int, last: float | None) -> str | None:
    """Say what the container promises and does not hold."""
    if packets < stream.frames:
        return f"it says {stream.frames} frames and holds {packets}"
    if container.duration and last is not None:
        # Times need not begin at 0; the length counts from the first one.
        start = (container.start_time or 0) / av.time_base
        length = container.duration / av.time_base
        if length - (last - start) > _SHORT + length / 20:
            return f"it says {length:.1f} s and ends at {last - start:.1f} s"
    return None


def _folder(folder: Path, warn: bool) -> Iterator[av.VideoFrame]:
    """Yield the numbered images of a folder in the order of their numbers."""
    size: tuple[int, int] | None = None
    for path in _series(folder):
        # The second frame is asked for, as what is cut off is known at the end of the file only.
        frame, *more = islice(_checked(_file(path, warn), path), 2)
        if more:
            raise ClipError("an image of the folder is an animation", where=printable(path))
        size = size or (frame.width, frame.height)
        if (frame.width, frame.height) != size:
            raise ClipError("the images of a folder have different sizes", where=printable(path),
                            why=f"{frame.width} x {frame.height} after {size[0]} x {size[1]}")  # fmt: skip
        # An image has no place in time of its own: `clips` sets frames without one evenly.
        frame.pts = None
        yield frame


def _series(folder: Path) -> list[Path]:
    found: dict[tuple[str, str], dict[int, Path]] = {}
    with _explained(folder):
        for path in folder.iterdir():
            match = _NUMBERED.fullmatch(path.name)
            if match is None or path.suffix.lower() not in _IMAGES or not path.is_file():
                continue
            series = found.setdefault((match[1], match[3].lower()), {})
            number = int(match[2][:18])
            if number in series:
                raise ClipError("two images of a folder have one number", where=printable(path))
            series[number] = path
    if not found:
        raise ClipError("the folder has no numbered images", where=printable(folder),
                        why="a clip is a series such as img_00001.jpg, in png or jpg")  # fmt: skip
    if len(found) > 1:
        names = ", ".join(printable(before + "*" + after) for before, after in sorted(found)[:4])
        raise ClipError("the folder has more than one series of images", where=printable(folder), why=names)
    (series,) = found.values()
    numbers = sorted(series)
    for before, after in pairwise(numbers):
        if after != before + 1:
            raise ClipError("the series of images has a hole", where=printable(folder),
                            why=f"no image has number {before + 1}")  # fmt: skip
    return [series[number] for number in numbers]


def _camera(name: str) -> Iterator[av.VideoFrame]:
    match = _CAMERA.fullmatch(name)
    number = match[1] if match else ""
    kinds = {"linux": ("v4l2", f"/dev/video{number}"), "darwin": ("avfoundation", number), "win32": ("dshow", number)}
    kind, device = kinds.get(sys.platform, ("v4l2", number))
    try:
        container = av.open(device, format=kind)
    except (av.FFmpegError, OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ClipError("the camera can't be opened", where=name, why=f"{kind} {device}: {why}") from error
    with _explained(name), container:
        yield from container.decode(video=0)


def _checked(frames: Iterator[av.VideoFrame], source: str | Path) -> Iterator[av.VideoFrame]:
    empty = True
    for frame in frames:
        _check_size(frame.width, frame.height, source)
        empty = False
        yield frame
    if empty:
        raise ClipError("the video has no frames", where=printable(source))


def _check_size(width: int, height: int, source: str | Path) -> None:
    """Refuse what would take all memory once it is scaled; 0 is a size that is not known yet."""
    if min(width, height) <= 0:
        return
    if width * height > MAX_PIXELS:
        raise ClipError("the frames are too large", where=printable(source),
                        why=f"{width} x {height} is more than {MAX_PIXELS} pixels")  # fmt: skip
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ClipError("the frames are too narrow for a crop", where=printable(source),
                        why=f"{width} x {height} is more than {MAX_ASPECT} to 1")  # fmt: skip


@contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    try:
        yield
    except av.ArgumentError as error:
        why = "it is of no format that is read: only files of video and images are, no texts and no lists"
        raise ClipError("the video can't be read", where=printable(path), why=why) from error
    except (av.FFmpegError, OSError, UnicodeError, ValueError, MemoryError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ClipError("the video can't be read", where=printable(path), why=why) from error
