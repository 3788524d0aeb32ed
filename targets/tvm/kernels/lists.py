"""Kernels that turn decisions into lists: channels, runs of pixels, touched lines, and the mask of a merge.

The kernels run for every gate at every step, so they are branch-free where a branch would be mispredicted. Every
candidate is written at the end of the list, and the end moves on if the candidate is active. No kernel is split over
threads.

A *channel list* is int32: count, then ascending indices. A *run list* is int32: [0] vectors, [1] capacity in
runs, from 16 output offsets, from 16 + capacity input offsets; padded to whole vectors by repeating the last run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.dialect.masks import tile_index
from dvexport.targets.tvm.kernels.abi import Frame, Kernel, i64, write_serial_kernel
from dvexport.targets.tvm.kernels.bounds import (
    LIST_HEAD,
    ListKind,
    Made,
    at_least,
    ceil,
    entry,
    fits,
    largest,
    most,
    reads,
    rising,
    size,
    writes,
)
from dvexport.targets.tvm.kernels.plane import Plane, require_two_axes
from dvexport.targets.tvm.kernels.vectors import ceil_div, constant, int32, load, register, splat, store
from dvexport.targets.tvm.machine.dtype import F32, S32, S64, U8, DType, kernel_name
from dvexport.targets.tvm.machine.machine import Machine

__all__ = [
    "cells_to_runs",
    "channel_list_size",
    "channels_from_mask",
    "channels_other_than",
    "channels_shape",
    "line_list_size",
    "line_table",
    "lines_shape",
    "mask_from_tiles",
    "mask_shape",
    "run_list_size",
    "runs_capacity",
    "runs_shape",
    "table_words",
    "touched_lines",
]

_BITS = 64
"""Cells of a word of `line_table`."""

_INDICES = S32.line
"""Indices of a list in a cache line: a vector may write so many beyond its end."""


class _Channels(IntEnum):
    """Entries of `shape` of the kernels that list channels."""

    COUNT = 0
    CONSTANT = 1


class _Runs(IntEnum):
    """Entries of `shape` of `cells_to_runs`."""

    CELLS = 0
    TOTAL = 1
    """Runs of all cells."""
    VECTOR = 2
    """Runs of a vector."""
    CAPACITY = 3


class _Mask(IntEnum):
    """Entries of `shape` of `mask_from_tiles`."""

    DOWN = 0
    ACROSS = 1
    WIDTH = 2
    PITCH = 3
    BASE = 4
    END = 5
    SIZE = 6
    STARTS = 7
    """From here on the first rows of cells and the end of the last; then columns alike."""


class _Lines(IntEnum):
    """Entries of `shape` of `touched_lines`."""

    CELLS = 0
    LINES = 1


def channel_list_size(channels: int) -> int:
    """Return the elements of a channel list."""
    return 1 + channels


def channels_shape(channels: int, constant: int = 0) -> np.ndarray:
    """Return `shape` of the kernels that list channels: how many, and what to compare an action with."""
    return np.array([channels, constant], np.int32)


def channels_from_mask(machine: Machine) -> Kernel:
    """List the channels whose `mask` (bool `[C]`) is set. Buffers: mask, shape, channels."""
    del machine
    return _channels("channels_from_mask", U8, lambda mask, other: _flag(mask))


def channels_other_than(machine: Machine) -> Kernel:
    """List the channels whose `action` (int64 `[C]`) is not shape[1]. Buffers: action, shape, channels."""
    del machine
    return _channels("channels_other_than", S64, lambda action, other: tx.Cast(S32.tvm, tx.NE(action, other)))


def _channels(name: str, dtype: DType, test: Callable[[Any, Any], Any]) -> Kernel:
    source = "mask" if dtype is U8 else "action"
    with write_serial_kernel(name, **{source: dtype, "shape": S32, "channels": S32}) as frame:
        (count,), decisions = frame.extents((_Channels.COUNT,)), frame.buffers[source]
        other = T.bind(i64(frame.shape[int(_Channels.CONSTANT)]))
        end = _counter()

        def append(channel: Any) -> None:
            active = T.bind(test(decisions[i64(channel)], other))
            T.buffer_store(frame.channels, channel, [i64(end[0] + 1)])
            T.buffer_store(end, end[0] + active, [0])

        _unrolled(count, 4, append)
        T.buffer_store(frame.channels, end[0], [0])
        items = entry(_Channels.COUNT)
        frame.states(
            {source: reads(items, scattered=True), "shape": reads(len(_Channels)), "channels": writes(items + 1)},
            makes=(Made("channels", ListKind.CHANNELS, count=items, limit=items),),
        )
    return frame.kernel


def _flag(value: Any) -> Any:
    """Return 1 for any byte but 0: how far a list grows must not depend on what else a byte may be."""
    return tx.Cast(S32.tvm, tx.NE(value, constant(0, U8)))


def _counter() -> Any:
    """A variable that starts as 0; LLVM keeps it in a register."""
    end = register(S32, 1)
    T.buffer_store(end, int32(0), [0])
    return end


def _unrolled(count: Any, times: int, body: Callable[[Any], None]) -> None:
    """Call `body` for 0 .. count - 1, `times` of them in a turn of the loop."""
    turns = T.bind(tx.truncdiv(count, times))
    with T.serial(0, turns) as turn:
        for step in range(times):
            body(T.bind(turn * times + step))
    with T.serial(turns * times, count) as index:
        body(index)


def runs_capacity(total: int, run: int, machine: Machine) -> int:
    """Return the capacity in runs of a list for `total` runs of `run` pixels: whole vectors."""
    vector = machine.lanes // run
    return -(-total // vector) * vector


def run_list_size(capacity: int) -> int:
    """Return the elements of a run list that a kernel writes: a vector may overshoot the end."""
    return LIST_HEAD + 2 * capacity + _INDICES


def runs_shape(cells: int, total: int, run: int, machine: Machine) -> np.ndarray:
    """Return `shape` of `cells_to_runs`, for so many cells and runs of all of them."""
    return np.array([cells, total, machine.lanes // run, runs_capacity(total, run, machine)], np.int32)


def cells_to_runs(machine: Machine) -> Kernel:
    """List the runs of the active cells. Buffers: cells (bool), table, shape, runs.

    `table` is int32: the start of each cell's runs and the end of the last (cells + 1), all output offsets in the
    order of cells, all input offsets (`direct_data.Runs.table`). `runs` has `run_list_size` elements. Outputs are
    written whole before inputs, so what a vector of outputs overshoots by is either unused or written again.
    """
    with write_serial_kernel("cells_to_runs", cells=U8, table=S32, shape=S32, runs=S32) as frame:
        cells, total, vector, capacity = frame.extents(_Runs)
        end = _counter()
        _append_cells(frame, end, T.bind(cells + 1), int32(LIST_HEAD), machine.lanes)
        T.buffer_store(end, int32(0), [0])
        _append_cells(frame, end, T.bind(cells + 1 + total), T.bind(capacity + LIST_HEAD), machine.lanes)
        T.buffer_store(frame.runs, tx.truncdiv(end[0] + (vector - 1), vector), [0])
        T.buffer_store(frame.runs, capacity, [1])
        _states_runs(frame, machine.lanes)
    return frame.kernel


def _states_runs(frame: Frame, lanes: int) -> None:
    """State what `cells_to_runs` touches: every cell's runs may be written at the end of those before it."""
    cells, total, vector, capacity = map(entry, _Runs)
    outputs, inputs = (largest(cells + 1 + total * half, total, buffer="table") + 1 for half in range(2))
    vectors, longest = ceil(total, vector), LIST_HEAD + capacity + total + lanes
    frame.states(
        {
            "cells": reads(cells, scattered=True), "table": reads(cells + 1 + total * 2), "shape": reads(len(_Runs)),
            "runs": writes(longest),
        },
        at_least(1, vector),
        fits(longest, cells + 1 + total * 2 + lanes),
        ((vector, size(lanes)), (vectors * vector, capacity), (rising(0, cells + 1, buffer="table"), total)),
        makes=(Made("runs", ListKind.RUNS, vectors, outputs, inputs, vector),),
    )  # fmt: skip


def _append_cells(frame: Frame, end: Any, source: Any, target: Any, lanes: int) -> None:
    """Copy the active cells' offsets from `source` in the table to `target` in the list, and repeat the last."""
    cells, total = frame.shape[int(_Runs.CELLS)], frame.shape[int(_Runs.TOTAL)]
    with T.serial(0, cells) as cell:
        start = T.bind(frame.table[i64(cell)])
        length = T.bind(frame.table[i64(cell + 1)] - start)
        here, there = T.bind(i64(source + start)), T.bind(i64(target + end[0]))
        with T.If(start + length + lanes <= total):  # whole vectors stay inside the table
            with T.Then(), T.serial(0, ceil_div(length, lanes)) as block:
                at = T.bind(i64(tx.min(block * lanes, total)))  # min: no call of memcpy
                store(frame.runs, there + at, load(frame.table, here + at, lanes), lanes)
            with T.Else(), T.serial(0, length) as index:
                at = T.bind(i64(tx.min(index, total - start - 1)))  # as above
                T.buffer_store(frame.runs, frame.table[here + at], [there + at])
        T.buffer_store(end, end[0] + length * _flag(frame.cells[i64(cell)]), [0])
    stop = T.bind(i64(target + end[0]))
    store(frame.runs, stop, splat(frame.runs[stop - 1], lanes), lanes)


def mask_shape(plane: Plane, grid: tuple[int, int]) -> np.ndarray:
    """Return `shape` of `mask_from_tiles`: sizes, then where the rows and columns of cells start.

    Pixel y belongs to cell floor(y * gh / H), columns alike (docs/dialect.md).

    Raises:
        UsageError: the plane has not two spatial axes.
    """
    require_two_axes("a mask of tiles", plane)
    end = plane.base + plane.height * plane.pitch
    sizes = [*grid, plane.width, plane.pitch, plane.base, end, plane.size]
    return np.array([*sizes, *_starts(plane.height, grid[0]), *_starts(plane.width, grid[1])], np.int32)


def _starts(size: int, cells: int) -> np.ndarray:
    """Return the first pixel of every cell of an axis, and the end of the last."""
    return np.searchsorted(tile_index(size, cells), np.arange(cells + 1))


def mask_from_tiles(machine: Machine, dtype: DType = F32) -> Kernel:
    """Upsample `tiles` (bool `[gh, gw]`) to `mask` (a plane): 1 at active pixels, else 0.

    Buffers: tiles, shape, mask. The first row of a row of cells is written cell by cell, and the others are its
    copies. Vectors overshoot to the right, into what is written next.
    """
    lanes = machine.lanes
    with write_serial_kernel(kernel_name(dtype, "mask_from_tiles"), tiles=U8, shape=S32, mask=dtype) as frame:
        down, across, width, pitch, base, end, size = frame.extents(list(_Mask)[: _Mask.STARTS])
        zero = constant(0.0, dtype, lanes)
        with T.serial(0, tx.truncdiv(base, lanes)) as index:
            store(frame.mask, i64(tx.min(index * lanes, base - lanes)), zero, lanes)
        with T.serial(0, down) as y:
            first = T.bind(base + frame.shape[y + int(_Mask.STARTS)] * pitch)
            beyond = T.bind(base + frame.shape[y + (_Mask.STARTS + 1)] * pitch)
            with T.If(first < beyond), T.Then():
                _mask_row(
                    frame, T.bind(i64(first)), T.bind(y * across), (T.bind(down + (_Mask.STARTS + 1)), across), lanes
                )
                with T.serial(0, ceil_div(pitch - width, lanes)) as block:
                    at = tx.min(first + width + block * lanes, size - lanes)  # min: no call of memset
                    store(frame.mask, i64(at), zero, lanes)
                _copy_row(frame, (first, beyond), pitch, lanes)
        with T.serial(0, ceil_div(size - end, lanes)) as index:
            store(frame.mask, i64(tx.min(end + index * lanes, size - lanes)), zero, lanes)
        _states_mask(frame, lanes)
    return frame.kernel


def _states_mask(frame: Frame, lanes: int) -> None:
    down, across, width, pitch, base, end, plane = map(entry, list(_Mask)[: _Mask.STARTS])
    bottom, right = rising(int(_Mask.STARTS), down + 1), rising(down + (_Mask.STARTS + 1), across + 1)
    cells = base + bottom * pitch + lanes
    frame.states(
        {
            "tiles": reads(down * across, scattered=True), "shape": reads(down + across + (_Mask.STARTS + 2)),
            "mask": writes(most(plane, cells)),
        },
        at_least(lanes, plane),
        at_least(1, pitch),
        fits(cells + width + lanes, plane + lanes, end + lanes, down * across),
        ((right, pitch),),
    )  # fmt: skip


def _mask_row(frame: Frame, row: Any, cell: Any, columns: tuple[Any, Any], lanes: int) -> None:
    """Write one row of pixels from the cells that start at `cell`; `columns` is (place in shape, count)."""
    place, across = columns
    with T.serial(0, across) as x:
        active = T.bind(splat(tx.Cast(frame.types["mask"].tvm, frame.tiles[i64(cell + x)]), lanes))
        start = T.bind(frame.shape[place + x])
        with T.serial(0, ceil_div(frame.shape[place + x + 1] - start, lanes)) as block:
            store(frame.mask, row + i64(start + block * lanes), active, lanes)


def _copy_row(frame: Frame, rows: tuple[Any, Any], pitch: Any, lanes: int) -> None:
    first, beyond = rows
    with T.serial(1, tx.truncdiv(beyond - first, pitch)) as row:
        target = T.bind(first + row * pitch)
        with T.serial(0, ceil_div(pitch, lanes)) as block:
            store(frame.mask, i64(target + block * lanes), load(frame.mask, i64(first + block * lanes), lanes), lanes)


def line_list_size(plane: Plane) -> int:
    """Return the elements of a list of lines."""
    return LIST_HEAD + plane.size // plane.dtype.line


def line_table(plane: Plane, grid: tuple[int, int], halo: int) -> np.ndarray:
    """Return the table of `touched_lines`: for each line, the cells that make it one to write.

    A cell covers its pixels and `halo` more on every side, which the next convolution reads.

    Returns:
        int64 `[lines, words]`: bit c of word w is cell 64 w + c.

    Raises:
        ValueError: the halo is wider than the plane's padding.
        UsageError: the plane has not two spatial axes.
    """
    require_two_axes("a list of lines", plane)
    if halo > plane.pad:
        raise ValueError(f"a halo of {halo} pixels is wider than the layout's padding of {plane.pad}")
    ys, xs = _starts(plane.height, grid[0]).tolist(), _starts(plane.width, grid[1]).tolist()
    line = plane.dtype.line
    bits = np.zeros((plane.size // line, table_words(grid)), np.uint64)
    for cell, (i, j) in enumerate(np.ndindex(grid)):
        if ys[i] == ys[i + 1] or xs[j] == xs[j + 1]:
            continue
        for y in range(ys[i] - halo, ys[i + 1] + halo):
            first, last = plane.offset(y, xs[j] - halo), plane.offset(y, xs[j + 1] - 1 + halo)
            bits[first // line : last // line + 1, cell // _BITS] |= np.uint64(1 << cell % _BITS)
    return bits.view(np.int64)


def table_words(grid: tuple[int, int]) -> int:
    """Return `words` of `touched_lines` for a grid: cells / 64, rounded up."""
    return -(-grid[0] * grid[1] // _BITS)


def lines_shape(plane: Plane, grid: tuple[int, int]) -> np.ndarray:
    """Return `shape` of `touched_lines`: cells, lines."""
    return np.array([grid[0] * grid[1], plane.size // plane.dtype.line], np.int32)


def touched_lines(words: int, machine: Machine, dtype: DType = F32) -> Kernel:
    """List the lines of a plane that active tiles touch, for `planes.merge_lines`. Buffers: tiles, table, shape, lines.

    `tiles` is bool `[gh * gw]`, `table` is `line_table`'s, `lines` has `line_list_size` elements: [0] count, [1] lines
    of the plane, from 16 ascending offsets of lines into the plane.

    Args:
        words: `table_words` of the grid.
        machine: what to generate code for.
        dtype: the element type of the plane.
    """
    del machine
    types, step = {"tiles": U8, "table": S64, "shape": S32, "lines": S32}, dtype.line
    with write_serial_kernel(kernel_name(dtype, f"touched_lines_{words}"), **types) as frame:
        cells, count = frame.extents(_Lines)
        active = [_pack(frame, cells, word) for word in range(words)]
        end = _counter()

        def append(line: Any) -> None:
            row = T.bind(i64(line) * words)
            hits = [tx.bitwise_and(frame.table[row + word], bits) for word, bits in enumerate(active)]
            touched = T.bind(functools.reduce(tx.bitwise_or, hits))
            T.buffer_store(frame.lines, line * step, [i64(end[0] + LIST_HEAD)])
            T.buffer_store(end, end[0] + tx.Cast(S32.tvm, tx.NE(touched, constant(0, S64))), [0])

        _unrolled(count, 4, append)
        T.buffer_store(frame.lines, end[0], [0])
        T.buffer_store(frame.lines, count, [1])
        tiles, lines = map(entry, _Lines)
        frame.states(
            {
                "tiles": reads(tiles, scattered=True), "table": reads(lines * words), "shape": reads(len(_Lines)),
                "lines": writes(lines + LIST_HEAD),
            },
            fits(lines * step + LIST_HEAD),
            makes=(Made("lines", ListKind.LINES, count=lines, limit=(lines - 1) * step + 1),),
        )  # fmt: skip
    return frame.kernel


def _pack(frame: Frame, cells: Any, word: int) -> Any:
    """Return cells 64 * word and on as the bits of an int64."""
    bits = register(S64, 1)
    T.buffer_store(bits, constant(0, S64), [0])
    with T.serial(0, tx.min(cells - word * _BITS, _BITS)) as cell:
        flag = tx.Cast(S64.tvm, frame.tiles[i64(cell + word * _BITS)])
        T.buffer_store(bits, tx.bitwise_or(bits[0], tx.shift_left(flag, i64(cell))), [0])
    return T.bind(bits[0])
