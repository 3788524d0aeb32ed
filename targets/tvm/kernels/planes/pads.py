"""The padding of planes: the entries of `shape` that say where it is, and what zeroes it."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.abi import Frame, i64, share
from dvexport.targets.tvm.kernels.bounds import PARTS, Needs, Size, at_least, entry, fits, most
from dvexport.targets.tvm.kernels.plane import Plane, require_two_axes
from dvexport.targets.tvm.kernels.vectors import ceil_div, constant, store
from dvexport.targets.tvm.machine.dtype import dtype_of

__all__ = ["FrameShape", "frame_entries", "padded_planes", "pads_fit", "zero_outside", "zero_pads_of"]


class FrameShape(IntEnum):
    """Entries of `shape` that kernels over images have in common, as `frame_entries` makes them; those of a plane."""

    CHANNELS = 0
    HEIGHT = 1
    WIDTH = 2
    PITCH = 3
    BASE = 4
    END = 5
    """Where the rows end, with the padding after the last one."""
    SIZE = 6


def frame_entries(kernel: str, channels: int, plane: Plane) -> list[int]:
    """Return the values of `FrameShape`.

    Raises:
        UsageError: the plane has not two axes; `kernel` is what a person calls the kernel.
    """
    require_two_axes(kernel, plane)
    end = plane.base + plane.height * plane.pitch
    return [channels, plane.height, plane.width, plane.pitch, plane.base, end, plane.size]


def padded_planes() -> Size:
    """Return the elements of planes that `zero_pads_of` and rows of images write."""
    channels, height, width, pitch, base, _, plane = map(entry, FrameShape)
    return (channels - 1) * plane + most(plane, base + height * pitch, base + (height - 1) * pitch + width)


def pads_fit(lanes: int) -> Needs:
    """Return what `padded_planes` needs to be all that is written."""
    channels, height, width, pitch, base, end, plane = map(entry, FrameShape)
    return (
        *at_least(lanes, plane),
        *fits(base + height * pitch + width + lanes, channels * (height + 1) * PARTS, plane + lanes, end + lanes),
    )


def zero_pads_of(frame: Frame, buffer: Any, lanes: int) -> None:
    """Zero this thread's planes but for their images.

    Args:
        frame: the kernel's frame, whose `shape` begins with `FrameShape`.
        buffer: the planes.
        lanes: the machine's lanes; base and size are multiples of them.
    """
    channels, height, width, pitch, base, end, size = (T.bind(frame.shape[each]) for each in map(int, FrameShape))
    low, high = share(channels, frame.part, frame.parts)
    with T.serial(low, high) as channel:
        plane = T.bind(i64(channel) * i64(size))
        zero_outside(buffer, plane, (base, end, size), lanes)
        with T.serial(width, pitch) as column:  # 1 to 3 of them
            first = T.bind(plane + i64(base + column))
            with T.serial(0, height) as row:
                store(buffer, first + i64(row * pitch), constant(0.0, dtype_of(buffer.dtype)), 1)


def zero_outside(buffer: Any, plane: Any, sizes: tuple[Any, Any, Any], lanes: int) -> None:
    """Zero a plane before `base` and from `end` on.

    Args:
        buffer: the planes.
        plane: int64 offset of the plane.
        sizes: int32 base, end and size; a vector fits before the one and after the other.
        lanes: the machine's lanes; base and size are multiples of them.
    """
    base, end, size = sizes
    zero = constant(0.0, dtype_of(buffer.dtype), lanes)
    with T.serial(0, tx.truncdiv(base, lanes)) as index:
        store(buffer, plane + i64(tx.min(index * lanes, base - lanes)), zero, lanes)  # min: no call of memset
    with T.serial(0, ceil_div(size - end, lanes)) as index:
        store(buffer, plane + i64(tx.min(end + index * lanes, size - lanes)), zero, lanes)
