"""Kernels that move planes: flat tensor to planes and back, pads, merges.

A merge is U = S * V, the mask upsampled to pixels. It is a selection and not a product: what a convolution left
unwritten may be any bits, and NaN * 0 is NaN. Two kernels do it. `merge` writes the listed channels whole.
`merge_lines` writes only the lines (16 floats) that a convolution on the active tiles reads, as listed by
`lists.touched_lines`. On 64 planes of 56 x 56 with 10 / 25 / 50 / 100 % of 7 x 7 random tiles it takes
0.3 / 0.7 / 0.9 / 1.1 times as long as `merge`, on 14 x 14 and 7 x 7 less at any rate. So it is the one to take where
all readers are convolutions on the same tiles, and `merge` where one of them reads everything, such as a pooling.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.decisions import Action
from dvexport.targets.tvm.kernels.abi import Frame, Kernel, i64, share, write_kernel
from dvexport.targets.tvm.kernels.bounds import (
    PARTS,
    Buffer,
    ListKind,
    Size,
    at_least,
    entry,
    fits,
    known,
    most,
    reads,
    uses,
    writes,
)
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.kernels.vectors import (
    LINE,
    cover,
    load,
    padded_planes,
    pads_fit,
    row_spans,
    spans_fit,
    splat,
    store,
    zero_around,
    zero_outside,
)
from dvexport.targets.tvm.machine.machine import Machine

__all__ = [
    "ends_shape",
    "frame_shape",
    "load_frame",
    "merge",
    "merge_history",
    "merge_lines",
    "merge_shape",
    "store_planes",
    "zero_ends",
    "zero_pads",
]


def frame_shape(channels: int, plane: Plane) -> np.ndarray:
    """Return `shape` of `load_frame`, `store_planes` and `zero_pads`: C, H, W, pitch, base, end of rows, size."""
    end = plane.base + plane.height * plane.pitch
    return np.array([channels, plane.height, plane.width, plane.pitch, plane.base, end, plane.size], np.int32)


def load_frame(machine: Machine) -> Kernel:
    """Flat `src [C, H, W]` to planes `dst`, pads zeroed. Buffers: src, shape, dst. Threads share rows."""

    def row(frame: Frame, flat: Any, plane: Any, lanes: int) -> None:
        store(frame.dst, plane, load(frame.src, flat, lanes), lanes)

    with write_kernel("load_frame", src="float32", shape="int32", dst="float32") as frame:
        _rows(frame, machine, row)
        _pads(frame, frame.dst, machine)
        frame.states(
            {"src": reads(_flat()), "shape": reads(7), "dst": writes(padded_planes())}, pads_fit(machine.lanes)
        )
    return frame.kernel


def store_planes(machine: Machine) -> Kernel:
    """Planes `src` to flat `dst [C, H, W]`. Buffers: src, shape, dst. Threads share rows."""

    def row(frame: Frame, flat: Any, plane: Any, lanes: int) -> None:
        store(frame.dst, flat, load(frame.src, plane, lanes), lanes)

    channels, height, width, pitch, base, _, plane = map(entry, range(7))
    last = base + (height - 1) * pitch + width
    with write_kernel("store_planes", src="float32", shape="int32", dst="float32") as frame:
        _rows(frame, machine, row)
        frame.states(
            {"src": reads((channels - 1) * plane + last), "shape": reads(7), "dst": writes(_flat())},
            fits(last, channels * height * PARTS),
        )
    return frame.kernel


def _flat() -> Size:
    """Floats of a flat tensor `[C, H, W]`."""
    return entry(0) * entry(1) * entry(2)


def zero_pads(machine: Machine) -> Kernel:
    """Zero everything of planes Y but their images. Buffers: shape, Y.

    For memory that another tensor used before, ahead of kernels that write images alone.
    """
    with write_kernel("zero_pads", shape="int32", Y="float32") as frame:
        _pads(frame, frame.Y, machine)
        frame.states({"shape": reads(7), "Y": writes(padded_planes())}, pads_fit(machine.lanes))
    return frame.kernel


def ends_shape(channels: int, plane: Plane) -> np.ndarray:
    """Return `shape` of `zero_ends`: C, base, the end of the last row's pixels, size."""
    last = plane.offset(plane.height - 1, plane.width)
    return np.array([channels, plane.base, last, plane.size], np.int32)


def zero_ends(machine: Machine) -> Kernel:
    """Zero what is before the first pixel and after the last one of planes Y. Buffers: shape, Y.

    For memory that another tensor used before, ahead of kernels that write from the first pixel to the last.
    """
    with write_kernel("zero_ends", shape="int32", Y="float32") as frame:
        channels, base, last, size = (T.bind(frame.shape[index]) for index in range(4))
        low, high = share(channels, frame.part, frame.parts)
        with T.serial(low, high) as channel:
            zero_outside(frame.Y, T.bind(i64(channel) * i64(size)), (base, last, size), machine.lanes)
        count, first, end, plane = map(entry, range(4))
        frame.states(
            {"shape": reads(4), "Y": writes((count - 1) * plane + most(plane, first))},
            at_least(machine.lanes, plane),
            fits(count * PARTS, plane + LINE, end + LINE),
        )
    return frame.kernel


def _rows(frame: Frame, machine: Machine, body: Any) -> None:
    """Loop over this thread's image rows in vectors; `body(frame, flat offset, plane offset, lanes)`."""
    channels, height, width, pitch, base = (T.bind(frame.shape[index]) for index in range(5))
    size = T.bind(i64(frame.shape[6]))
    low, high = share(channels * height, frame.part, frame.parts)

    def rows(place: Any, count: Any, lanes: int) -> None:
        with T.serial(low, high) as row:
            channel = T.bind(tx.truncdiv(row, height))
            flat = T.bind(i64(row) * i64(width))
            plane = T.bind(i64(channel) * size + i64(base + (row - channel * height) * pitch))
            with T.serial(0, count) as index:
                at = T.bind(i64(place(index)))
                body(frame, T.bind(flat + at), T.bind(plane + at), lanes)

    cover(width, machine.lanes, rows)


def _pads(frame: Frame, buffer: Any, machine: Machine) -> None:
    """Zero the pads of this thread's planes."""
    channels, *sizes = (T.bind(frame.shape[index]) for index in range(7))
    low, high = share(channels, frame.part, frame.parts)
    with T.serial(low, high) as channel:
        zero_around(buffer, T.bind(i64(channel) * i64(sizes[-1])), tuple(sizes), machine.lanes)


def merge_shape(plane: Plane) -> np.ndarray:
    """Return `shape` of the merges: floats of a plane."""
    return np.array([plane.size], np.int32)


def merge(machine: Machine) -> Kernel:
    """U[c] = S * V[c] for the channels c in `rows`, whole planes. Buffers: V, mask, rows, shape, U.

    `mask` is float32 `[plane size]`, not 0 at active pixels of the image. U may be V. Where it is not, other
    channels of U keep what they had. Threads share channels x lines.
    """
    types = {"V": "float32", "mask": "float32", "rows": "int32", "shape": "int32", "U": "float32"}
    with write_kernel("merge", **types) as frame, _listed(frame) as (row, first, last):
        plane = T.bind(i64(frame.rows[row + 1]) * i64(frame.shape[0]))
        _select_plane(frame, frame.V, plane, (first, last), machine)
        _states_planes(frame, ("V",))
    return frame.kernel


def _states_planes(frame: Frame, sources: tuple[str, ...], more: dict[str, Buffer] | None = None) -> None:
    """State what merges over whole planes touch."""
    floats = known("rows", "limit") * entry(0)
    stated = {name: reads(floats) for name in sources} | {"mask": reads(entry(0)), "rows": uses(ListKind.CHANNELS)}
    stated |= {"shape": reads(1), "U": writes(floats, over=sources)}
    frame.states(stated | (more or {}), spans_fit(known("rows", "count"), entry(0) // LINE))


def merge_history(machine: Machine) -> Kernel:
    """U[c] = S * (V[c] if action[c] is 2 else H[c]) for c in `rows`. Buffers: V, H, mask, action, rows, shape, U.

    For one frame of a clip; `action` is int64 `[C]`, and `rows` lists the channels whose action is not 0. U may
    be V or H. The rest as `merge`.
    """
    types = {"V": "float32", "H": "float32", "mask": "float32", "action": "int64", "rows": "int32"}
    types |= {"shape": "int32", "U": "float32"}
    with write_kernel("merge_history", **types) as frame, _listed(frame) as (row, first, last):
        channel = T.bind(i64(frame.rows[row + 1]))
        plane = T.bind(channel * i64(frame.shape[0]))
        with T.If(tx.EQ(frame.action[channel], tx.IntImm("int64", Action.COMPUTE.value))):
            with T.Then():
                _select_plane(frame, frame.V, plane, (first, last), machine)
            with T.Else():
                _select_plane(frame, frame.H, plane, (first, last), machine)
        _states_planes(frame, ("V", "H"), {"action": reads(known("rows", "limit"), scattered=True)})
    return frame.kernel


def merge_lines(machine: Machine) -> Kernel:
    """U[c] = S * V[c] for c in `rows`, in the listed lines alone. Buffers: V, mask, rows, lines, shape, U.

    `lines` is what `lists.touched_lines` writes: [0] their number, from 16 offsets into a plane, multiples of 16.
    Other pixels of U keep what they had, which nobody reads. The rest as `merge`.
    """
    types = {"V": "float32", "mask": "float32", "rows": "int32", "lines": "int32", "shape": "int32", "U": "float32"}
    with write_kernel("merge_lines", **types) as frame, _spans(frame, frame.lines[0]) as (row, first, last):
        plane = T.bind(i64(frame.rows[row + 1]) * i64(frame.shape[0]))
        with T.serial(first, last) as index:
            line = T.bind(i64(frame.lines[index + LINE]))
            _select_line(frame, frame.V, plane, line, machine)
        end = known("lines", "limit") - 1 + LINE
        floats = (known("rows", "limit") - 1) * entry(0) + end
        frame.states(
            {
                "V": reads(floats), "mask": reads(end), "rows": uses(ListKind.CHANNELS), "lines": uses(ListKind.LINES),
                "shape": reads(1), "U": writes(floats, over=("V",)),
            },
            spans_fit(known("rows", "count"), known("lines", "count")),
        )  # fmt: skip
    return frame.kernel


def _listed(frame: Frame) -> AbstractContextManager[tuple[Any, Any, Any]]:
    """Loop over this thread's share of the listed channels x lines of a plane."""
    return _spans(frame, tx.truncdiv(frame.shape[0], LINE))


def _spans(frame: Frame, length: Any) -> AbstractContextManager[tuple[Any, Any, Any]]:
    return row_spans(frame, frame.rows[0], T.bind(length))


def _select_plane(frame: Frame, source: Any, plane: Any, span: tuple[Any, Any], machine: Machine) -> None:
    with T.serial(*span) as line:
        _select_line(frame, source, plane, T.bind(i64(line) * LINE), machine)


def _select_line(frame: Frame, source: Any, plane: Any, line: Any, machine: Machine) -> None:
    for within in range(0, LINE, machine.lanes):
        _select(frame, source, plane, line + within, machine)


def _select(frame: Frame, source: Any, plane: Any, pixel: Any, machine: Machine) -> None:
    """U = source where the mask is not 0, else 0: a vector of pixels of one plane."""
    lanes, zero = machine.lanes, splat(0.0, machine.lanes)
    active = tx.NE(load(frame.mask, pixel, lanes), zero)
    store(frame.U, plane + pixel, tx.Select(active, load(source, plane + pixel, lanes), zero), lanes)
