"""Pooling kernels: windows over planes, cells of a tile grid, and the mean over a plane."""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import IntEnum
from math import prod
from typing import Any

import numpy as np
import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.abi import Frame, Kernel, i64, share, write_kernel
from dvexport.targets.tvm.kernels.bounds import PARTS, Buffer, Needs, Size, ceil, entry, fits, most, reads, size, writes
from dvexport.targets.tvm.kernels.plane import Plane, require_two_axes
from dvexport.targets.tvm.kernels.planes.pads import FrameShape, frame_entries, padded_planes, pads_fit, zero_pads_of
from dvexport.targets.tvm.kernels.vectors import ceil_div, constant, cover, load, register, splat, store, strided
from dvexport.targets.tvm.machine.dtype import F32, S32, DType, kernel_name
from dvexport.targets.tvm.machine.machine import Machine

__all__ = [
    "avg_pool",
    "cell_mean",
    "cell_mean_scratch",
    "cell_mean_shape",
    "global_mean",
    "global_mean_shape",
    "max_pool",
    "pool_shape",
]

Pair = tuple[int, int]

_BITS = 32
"""Bits of a number that is halved by shifting."""


class _Pool(IntEnum):
    """Entries of `shape` of `max_pool` and `avg_pool` after those of `FrameShape`, which are Y's."""

    WINDOW = len(FrameShape)
    """Where the first window begins in a plane of X."""
    ROW_STEP = len(FrameShape) + 1
    """From one window to the next below."""
    PITCH = len(FrameShape) + 2
    """The pitch of X."""
    SIZE = len(FrameShape) + 3
    """The size of a plane of X."""
    SCALE = len(FrameShape) + 4
    """Bits of what a sum is multiplied with."""


class _Cells(IntEnum):
    """Entries of `shape` of `cell_mean`."""

    CHANNELS = 0
    SIZE = 1
    BASE = 2
    PITCH = 3
    DOWN = 4
    """Rows of cells."""
    ACROSS = 5
    """Cells of a row."""
    HEIGHT = 6
    """Rows of a cell."""
    WIDTH = 7
    """Columns of a cell."""
    HALVINGS = 8
    ODD = 9
    """Sums that a cell has left after them."""
    SCALE = 10
    PART = 11
    """Scratch of a thread."""


class _Global(IntEnum):
    """Entries of `shape` of `global_mean`."""

    CHANNELS = 0
    SIZE = 1
    BASE = 2
    LENGTH = 3
    """From the first pixel to the end of the last row."""
    SCALE = 4


def _bits(factor: float) -> int:
    """Return a factor as `shape` holds it."""
    return int(np.float32(factor).view(np.int32))


def pool_shape(
    channels: int, source: Plane, target: Plane, strides: Pair, pads: Pair = (0, 0), count: int = 1
) -> np.ndarray:
    """Return `shape` of `max_pool` and `avg_pool`.

    Args:
        channels: number of planes.
        source, target: layout of X and of Y.
        strides: down and across.
        pads: rows above and columns to the left that windows reach beyond the image; at most `source.pad`.
        count: pixels that an average divides by; 1 for a maximum.

    Raises:
        ValueError: windows reach beyond the padding that the layout has.
        UsageError: a plane has not two spatial axes.
    """
    require_two_axes("pooling", source)
    if max(pads) > source.pad:
        raise ValueError(f"windows reach {max(pads)} pixels beyond the image, the layout has {source.pad}")
    window = source.base - pads[0] * source.pitch - pads[1]
    own = [window, strides[0] * source.pitch, source.pitch, source.size, _bits(1 / count)]
    return np.array([*frame_entries("pooling", channels, target), *own], np.int32)


def max_pool(kernel: Pair, step: int, machine: Machine, dtype: DType = F32) -> Kernel:
    """Maximum over windows, planes X to planes Y with their pads. Buffers: X, shape, Y.

    X must not be negative (it follows a ReLU): what a window reads beyond the image counts as 0.

    Args:
        kernel: height and width of the window.
        step: stride across, 1 or 2.
        machine: what to generate code for.
        dtype: the type of a pixel.
    """
    name = kernel_name(dtype, f"max_pool_{kernel[0]}x{kernel[1]}_s{step}")
    return _pool(name, kernel, step, machine, dtype, tx.max, lambda value, scale: value)


def avg_pool(kernel: Pair, step: int, machine: Machine, dtype: DType = F32) -> Kernel:
    """Average over windows, pads counted, planes X to planes Y with their pads. Buffers: X, shape, Y.

    Args: as `max_pool`.
    """
    name = kernel_name(dtype, f"avg_pool_{kernel[0]}x{kernel[1]}_s{step}")
    return _pool(name, kernel, step, machine, dtype, lambda a, b: a + b, lambda value, scale: value * scale)


def _pool(
    name: str,
    kernel: Pair,
    step: int,
    machine: Machine,
    dtype: DType,
    combine: Callable[[Any, Any], Any],
    finish: Callable[[Any, Any], Any],
) -> Kernel:
    """Write a pooling: rows of a window first, whole vectors; then its columns. Threads share output rows."""
    with write_kernel(name, X=dtype, shape=S32, Y=dtype) as frame:
        channels, height, width, pitch, base = frame.extents(list(FrameShape)[: FrameShape.END])
        places = (FrameShape.SIZE, *list(_Pool)[:-1])
        size, window, row_step, row, plane = (T.bind(i64(frame.shape[int(each)])) for each in places)
        scale = _scale(frame, _Pool.SCALE)
        low, high = share(channels * height, frame.part, frame.parts)

        def rows(place: Callable[[Any], Any], count: Any, lanes: int) -> None:
            factor = splat(scale, lanes)
            with T.serial(low, high) as index:
                channel = T.bind(tx.truncdiv(index, height))
                y = T.bind(index - channel * height)
                source = T.bind(i64(channel) * plane + window + i64(y) * row_step)
                target = T.bind(i64(channel) * size + i64(base + y * pitch))
                with T.serial(0, count) as block:
                    x = T.bind(i64(place(block)))
                    value = _window(frame.X, T.bind(source + x * step), row, kernel, (step, lanes), combine)
                    store(frame.Y, target + x, finish(value, factor), lanes)

        cover(width, machine.lanes, rows)
        zero_pads_of(frame, frame.Y, machine.lanes)
        entries = len(FrameShape) + len(_Pool)
        stated = {"X": reads(_pooled(kernel, step, machine.lanes)), "shape": reads(entries)}
        frame.states(stated | {"Y": writes(padded_planes())}, pads_fit(machine.lanes))
    return frame.kernel


def _scale(frame: Frame, place: int) -> Any:
    """Return the factor whose bits are an entry of `shape`."""
    return T.bind(tx.reinterpret(F32.tvm, frame.shape[int(place)]))


def _pooled(kernel: Pair, step: int, lanes: int) -> Size:
    """Elements of X that windows read, by the entries of `pool_shape`.

    With a step of 2, vectors are read in pairs, and a third or a pair farther on for the columns after the second.
    """
    beyond = kernel[1] - 1 if step == 1 else 0 if kernel[1] <= step else most(lanes, kernel[1] - 1)
    channels, height, width = map(entry, (FrameShape.CHANNELS, FrameShape.HEIGHT, FrameShape.WIDTH))
    window, row_step, row, plane = map(entry, list(_Pool)[:-1])
    return (channels - 1) * plane + window + (height - 1) * row_step + (kernel[0] - 1) * row + width * step + beyond


def _window(buffer: Any, corner: Any, row: Any, kernel: Pair, across: Pair, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine the pixels of `lanes` neighbouring windows; `across` is (step, lanes)."""
    step, lanes = across

    @functools.cache
    def column(offset: int) -> Any:
        taps = [load(buffer, corner + row * y + offset, lanes) for y in range(kernel[0])]
        return T.bind(functools.reduce(combine, taps))

    return functools.reduce(combine, [strided(column, x, step, lanes) for x in range(kernel[1])])


def cell_mean_shape(channels: int, plane: Plane, cell: Pair) -> np.ndarray:
    """Return `shape` of `cell_mean` for cells of (height, width) pixels; what the cells leave over is not read."""
    require_two_axes("cell_mean", plane)
    across, down = plane.width // cell[1], plane.height // cell[0]
    odd = cell[1] // (cell[1] & -cell[1])
    halvings = (cell[1] & -cell[1]).bit_length() - 1
    scale = _bits(1 / (cell[0] * cell[1]))
    sizes = [channels, plane.size, plane.base, plane.pitch, down, across, cell[0], cell[1]]
    return np.array([*sizes, halvings, odd, scale, _cell_mean_floats(plane, cell)], np.int32)


def cell_mean_scratch(plane: Plane, cell: Pair, threads: int) -> int:
    """Return the elements of `cell_mean`'s scratch."""
    return threads * _cell_mean_floats(plane, cell)


def _cell_mean_floats(plane: Plane, cell: Pair) -> int:
    sums = (plane.height // cell[0]) * (plane.width // cell[1] * cell[1])
    line = plane.dtype.line
    return -(-sums // line) * line + 2 * line  # a pass reads up to two vectors beyond the last sum


def cell_mean(machine: Machine, dtype: DType = F32) -> Kernel:
    """Mean over every cell of a grid, planes X to flat Y `[C, gh, gw]`. Buffers: X, scratch, shape, Y.

    ONNX's AveragePool with strides equal to the kernel and no pads. Threads share channels. Sums go down the rows
    of a cell in whole vectors; then neighbours are added, halving the sums until a cell has an odd number of them.
    """
    name = kernel_name(dtype, "cell_mean")
    with write_kernel(name, X=dtype, scratch=dtype, shape=S32, Y=dtype) as frame:
        down, across = frame.extents((_Cells.DOWN, _Cells.ACROSS))
        cells = T.bind(down * across)
        sums = T.bind(i64(frame.part) * i64(_cell(frame, _Cells.PART)))
        low, high = share(_cell(frame, _Cells.CHANNELS), frame.part, frame.parts)
        with T.serial(low, high) as channel:
            _sum_rows(frame, i64(channel) * i64(_cell(frame, _Cells.SIZE)), sums, machine.lanes)
            with T.serial(0, _cell(frame, _Cells.HALVINGS)) as halving:
                total = T.bind(tx.shift_right(cells * _cell(frame, _Cells.WIDTH), halving + 1))
                _add_pairs(frame, sums, total, machine.lanes)
            _finish_cells(frame, sums, (cells, T.bind(i64(channel) * i64(cells))), machine.lanes)
        frame.states(*_cell_mean_bounds(machine.lanes, dtype))
    return frame.kernel


def _cell(frame: Frame, place: _Cells) -> Any:
    return frame.shape[int(place)]


def _cell_mean_bounds(lanes: int, dtype: DType) -> tuple[dict[str, Buffer], Needs]:
    channels, plane, base, pitch, down, across, height, columns, halvings, odd, _, part = map(entry, _Cells)
    width, rows = across * columns, down * most(height, 1)
    sums = most(down * width + lanes, down * across * odd, down * width + 2 * lanes)
    buffers = {
        "X": reads((channels - 1) * plane + base + (rows - 1) * pitch + ceil(width, lanes) * lanes),
        "scratch": writes((PARTS - 1) * part + sums),
        "shape": reads(len(_Cells)),
        "Y": writes(channels * down * across),
    }
    needs = fits(channels * PARTS, base + rows * pitch, down * width + dtype.line, down * across * odd)
    return buffers, (*needs, (halvings, size(_BITS - 2)))


def _sum_rows(frame: Frame, plane: Any, sums: Any, lanes: int) -> None:
    """Sum every cell's rows: scratch `[gh, gw * cell width]`, each row overshooting into the next, not yet written."""
    dtype = frame.types["X"]
    base, pitch, down = frame.extents((_Cells.BASE, _Cells.PITCH, _Cells.DOWN))
    height = T.bind(tx.max(_cell(frame, _Cells.HEIGHT), 1))  # a loop that may be empty, LLVM would call memset for
    width = T.bind(_cell(frame, _Cells.ACROSS) * _cell(frame, _Cells.WIDTH))
    with T.serial(0, down) as y:
        source = T.bind(plane + i64(base + y * height * pitch))
        with T.serial(0, ceil_div(width, lanes)) as block:
            x = T.bind(i64(block * lanes))
            total = register(dtype, lanes)
            store(total, 0, constant(0.0, dtype, lanes), lanes)
            with T.serial(0, height) as row:
                store(total, 0, load(total, 0, lanes) + load(frame.X, source + x + i64(row * pitch), lanes), lanes)
            store(frame.scratch, sums + i64(y * width) + x, load(total, 0, lanes), lanes)


def _add_pairs(frame: Frame, sums: Any, total: Any, lanes: int) -> None:
    """Replace the first 2 * total sums by the sums of neighbours; a vector is read before its place is written."""
    with T.serial(0, ceil_div(total, lanes)) as block:
        at = T.bind(i64(block * lanes))
        left, right = (
            strided(lambda offset: load(frame.scratch, sums + at * 2 + offset, lanes), tap, 2, lanes) for tap in (0, 1)
        )
        store(frame.scratch, sums + at, left + right, lanes)


def _finish_cells(frame: Frame, sums: Any, target: tuple[Any, Any], machine_lanes: int) -> None:
    """Add the sums that a cell has left (one, or an odd number), and scale; `target` is (cells, offset in Y)."""
    cells, first = target
    left = T.bind(_cell(frame, _Cells.ODD))
    scale = _scale(frame, _Cells.SCALE)

    def blocks(place: Callable[[Any], Any], count: Any, lanes: int) -> None:
        factor = splat(scale, lanes)
        with T.If(tx.EQ(left, 1)):
            with T.Then(), T.serial(0, count) as block:
                at = T.bind(i64(place(block)))
                store(frame.Y, first + at, load(frame.scratch, sums + at, lanes) * factor, lanes)
            with T.Else(), T.serial(0, count) as block:
                at = T.bind(i64(place(block)))
                store(frame.Y, first + at, _sum_apart(frame, sums + at * i64(left), left, lanes) * factor, lanes)

    cover(cells, machine_lanes, blocks)


def _sum_apart(frame: Frame, source: Any, count: Any, lanes: int) -> Any:
    """Sum `count` neighbours in each lane. Lanes are loaded one by one: cells 3, 5, 6 or 7 wide are rare."""
    buffer, dtype = frame.scratch, frame.types["scratch"]
    total = register(dtype, lanes)
    store(total, 0, constant(0.0, dtype, lanes), lanes)
    with T.serial(0, count) as tap:
        index = source + i64(tap)
        value = buffer[index if lanes == 1 else tx.Ramp(index, i64(count), lanes)]
        store(total, 0, load(total, 0, lanes) + value, lanes)
    return load(total, 0, lanes)


def global_mean_shape(channels: int, plane: Plane) -> np.ndarray:
    """Return `shape` of `global_mean`."""
    length = plane.shape[0] * plane.strides[0]
    return np.array([channels, plane.size, plane.base, length, _bits(1 / prod(plane.shape))], np.int32)


_CHAINS = 4
"""Sums of a plane under way at a time: an addition takes 3-4 cycles."""


def global_mean(machine: Machine, dtype: DType = F32) -> Kernel:
    """Mean over every plane of X, to flat Y `[C]`. Buffers: X, shape, Y. Threads share channels.

    The pads are zero, so a plane is summed from its first pixel to its last as one row of vectors.
    """
    lanes = machine.lanes
    with write_kernel(kernel_name(dtype, "global_mean"), X=dtype, shape=S32, Y=dtype) as frame:
        size, base = (T.bind(i64(frame.shape[int(place)])) for place in (_Global.SIZE, _Global.BASE))
        vectors = T.bind(ceil_div(frame.shape[int(_Global.LENGTH)], lanes))
        turns = T.bind(tx.truncdiv(vectors, _CHAINS))
        scale = _scale(frame, _Global.SCALE)
        low, high = share(frame.shape[int(_Global.CHANNELS)], frame.part, frame.parts)
        with T.serial(low, high) as channel:
            plane = T.bind(i64(channel) * size + base)
            totals = [register(dtype, lanes) for _ in range(_CHAINS)]
            for total in totals:
                store(total, 0, constant(0.0, dtype, lanes), lanes)
            with T.serial(0, turns) as turn:
                at = T.bind(plane + i64(turn * (_CHAINS * lanes)))
                for chain, total in enumerate(totals):
                    store(total, 0, load(total, 0, lanes) + load(frame.X, at + chain * lanes, lanes), lanes)
            with T.serial(turns * _CHAINS, vectors) as vector:
                value = load(totals[0], 0, lanes) + load(frame.X, plane + i64(vector * lanes), lanes)
                store(totals[0], 0, value, lanes)
            a, b, c, d = (load(total, 0, lanes) for total in totals)
            store(frame.Y, i64(channel), _sum_lanes((a + b) + (c + d), lanes) * scale, 1)
        channels, plane_size, first, length = map(entry, list(_Global)[:-1])
        read = (channels - 1) * plane_size + first + ceil(length, lanes) * lanes
        stated = {"X": reads(read), "shape": reads(len(_Global)), "Y": writes(channels)}
        frame.states(stated, fits(channels * PARTS, length + _CHAINS * dtype.line))
    return frame.kernel


def _sum_lanes(value: Any, lanes: int) -> Any:
    """Add the lanes of a vector: halves onto each other until one is left."""
    while lanes > 1:
        lanes //= 2
        value = T.bind(value)
        value = tx.Shuffle([value], list(range(lanes))) + tx.Shuffle([value], list(range(lanes, 2 * lanes)))
    return value
