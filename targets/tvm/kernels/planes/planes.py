"""Kernels that move planes: flat tensor to planes and back, pads, merges.

A merge is U = S * V, the mask upsampled to pixels. It is a selection and not a product: what a convolution left
unwritten may be any bits, and NaN * 0 is NaN. Two kernels do it. `merge` writes the listed channels whole.
`merge_lines` writes only the cache lines (16 floats) that a convolution on the active tiles reads, as listed by
`lists.touched_lines`. On 64 planes of 56 x 56 with 10 / 25 / 50 / 100 % of 7 x 7 random tiles it takes
0.3 / 0.7 / 0.9 / 1.1 times as long as `merge`, on 14 x 14 and 7 x 7 less at any rate. So it is the one to take where
all readers are convolutions on the same tiles, and `merge` where one of them reads everything, such as a pooling.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from enum import IntEnum
from typing import Any

import numpy as np
import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.decisions import Action
from dvexport.targets.tvm.kernels.abi import Frame, Kernel, i64, share, write_kernel
from dvexport.targets.tvm.kernels.bounds import (
    LIST_HEAD,
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
from dvexport.targets.tvm.kernels.planes.pads import (
    FrameShape,
    frame_entries,
    padded_planes,
    pads_fit,
    zero_outside,
    zero_pads_of,
)
from dvexport.targets.tvm.kernels.vectors import constant, cover, load, row_spans, spans_fit, store
from dvexport.targets.tvm.machine.dtype import F32, S32, S64, DType, kernel_name
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


class _Ends(IntEnum):
    """Entries of `shape` of `zero_ends`."""

    CHANNELS = 0
    BASE = 1
    LAST = 2
    """Where the last row's pixels end."""
    SIZE = 3


class _Merge(IntEnum):
    """Entries of `shape` of the merges."""

    SIZE = 0


def frame_shape(channels: int, plane: Plane) -> np.ndarray:
    """Return `shape` of `load_frame`, `store_planes` and `zero_pads` (`FrameShape`).

    Raises:
        UsageError: the plane has not two spatial axes.
    """
    return np.array(frame_entries("moving images", channels, plane), np.int32)


def load_frame(machine: Machine, dtype: DType = F32) -> Kernel:
    """Flat `src [C, H, W]` to planes `dst`, pads zeroed. Buffers: src, shape, dst. Threads share rows."""

    def row(frame: Frame, flat: Any, plane: Any, lanes: int) -> None:
        store(frame.dst, plane, load(frame.src, flat, lanes), lanes)

    with write_kernel(kernel_name(dtype, "load_frame"), src=dtype, shape=S32, dst=dtype) as frame:
        _rows(frame, machine, row)
        zero_pads_of(frame, frame.dst, machine.lanes)
        stated = {"src": reads(_flat()), "shape": reads(len(FrameShape)), "dst": writes(padded_planes())}
        frame.states(stated, pads_fit(machine.lanes))
    return frame.kernel


def store_planes(machine: Machine, dtype: DType = F32) -> Kernel:
    """Planes `src` to flat `dst [C, H, W]`. Buffers: src, shape, dst. Threads share rows."""

    def row(frame: Frame, flat: Any, plane: Any, lanes: int) -> None:
        store(frame.dst, flat, load(frame.src, plane, lanes), lanes)

    channels, height, width, pitch, base, _, plane = map(entry, FrameShape)
    last = base + (height - 1) * pitch + width
    with write_kernel(kernel_name(dtype, "store_planes"), src=dtype, shape=S32, dst=dtype) as frame:
        _rows(frame, machine, row)
        stated = {"src": reads((channels - 1) * plane + last), "shape": reads(len(FrameShape)), "dst": writes(_flat())}
        frame.states(stated, fits(last, channels * height * PARTS))
    return frame.kernel


def _flat() -> Size:
    """Elements of a flat tensor `[C, H, W]`."""
    return entry(FrameShape.CHANNELS) * entry(FrameShape.HEIGHT) * entry(FrameShape.WIDTH)


def zero_pads(machine: Machine, dtype: DType = F32) -> Kernel:
    """Zero everything of planes Y but their images. Buffers: shape, Y.

    For memory that another tensor used before, ahead of kernels that write images alone.
    """
    with write_kernel(kernel_name(dtype, "zero_pads"), shape=S32, Y=dtype) as frame:
        zero_pads_of(frame, frame.Y, machine.lanes)
        frame.states({"shape": reads(len(FrameShape)), "Y": writes(padded_planes())}, pads_fit(machine.lanes))
    return frame.kernel


def ends_shape(channels: int, plane: Plane) -> np.ndarray:
    """Return `shape` of `zero_ends`."""
    last = plane.offset(*(size - 1 for size in plane.shape)) + 1
    return np.array([channels, plane.base, last, plane.size], np.int32)


def zero_ends(machine: Machine, dtype: DType = F32) -> Kernel:
    """Zero what is before the first pixel and after the last one of planes Y. Buffers: shape, Y.

    For memory that another tensor used before, ahead of kernels that write from the first pixel to the last.
    """
    with write_kernel(kernel_name(dtype, "zero_ends"), shape=S32, Y=dtype) as frame:
        channels, base, last, size = frame.extents(_Ends)
        low, high = share(channels, frame.part, frame.parts)
        with T.serial(low, high) as channel:
            zero_outside(frame.Y, T.bind(i64(channel) * i64(size)), (base, last, size), machine.lanes)
        count, first, end, plane = map(entry, _Ends)
        frame.states(
            {"shape": reads(len(_Ends)), "Y": writes((count - 1) * plane + most(plane, first))},
            at_least(machine.lanes, plane),
            fits(count * PARTS, plane + dtype.line, end + dtype.line),
        )
    return frame.kernel


def _rows(frame: Frame, machine: Machine, body: Any) -> None:
    """Loop over this thread's image rows in vectors; `body(frame, flat offset, plane offset, lanes)`."""
    channels, height, width, pitch, base = frame.extents(list(FrameShape)[: FrameShape.END])
    size = T.bind(i64(frame.shape[int(FrameShape.SIZE)]))
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


def merge_shape(plane: Plane) -> np.ndarray:
    """Return `shape` of the merges: elements of a plane."""
    return np.array([plane.size], np.int32)


def merge(machine: Machine, dtype: DType = F32) -> Kernel:
    """U[c] = S * V[c] for the channels c in `rows`, whole planes. Buffers: V, mask, rows, shape, U.

    `mask` is of V's type, `[plane size]`, not 0 at active pixels of the image. U may be V. Where it is not, other
    channels of U keep what they had. Threads share channels x lines.
    """
    types = {"V": dtype, "mask": dtype, "rows": S32, "shape": S32, "U": dtype}
    with write_kernel(kernel_name(dtype, "merge"), **types) as frame, _listed(frame) as (row, first, last):
        plane = T.bind(i64(frame.rows[row + 1]) * i64(frame.shape[int(_Merge.SIZE)]))
        _select_plane(frame, frame.V, plane, (first, last), machine)
        _states_planes(frame, ("V",))
    return frame.kernel


def _states_planes(frame: Frame, sources: tuple[str, ...], more: dict[str, Buffer] | None = None) -> None:
    """State what merges over whole planes touch."""
    size = entry(_Merge.SIZE)
    elements = known("rows", "limit") * size
    stated = {name: reads(elements) for name in sources} | {"mask": reads(size), "rows": uses(ListKind.CHANNELS)}
    stated |= {"shape": reads(len(_Merge)), "U": writes(elements, over=sources)}
    frame.states(stated | (more or {}), spans_fit(known("rows", "count"), size // frame.types["U"].line))


def merge_history(machine: Machine, dtype: DType = F32) -> Kernel:
    """U[c] = S * (V[c] if action[c] is 2 else H[c]) for c in `rows`. Buffers: V, H, mask, action, rows, shape, U.

    For one frame of a clip; `action` is int64 `[C]`, and `rows` lists the channels whose action is not 0. U may
    be V or H. The rest as `merge`.
    """
    types = {"V": dtype, "H": dtype, "mask": dtype, "action": S64, "rows": S32, "shape": S32, "U": dtype}
    with write_kernel(kernel_name(dtype, "merge_history"), **types) as frame, _listed(frame) as (row, first, last):
        channel = T.bind(i64(frame.rows[row + 1]))
        plane = T.bind(channel * i64(frame.shape[int(_Merge.SIZE)]))
        with T.If(tx.EQ(frame.action[channel], constant(Action.COMPUTE.value, S64))):
            with T.Then():
                _select_plane(frame, frame.V, plane, (first, last), machine)
            with T.Else():
                _select_plane(frame, frame.H, plane, (first, last), machine)
        _states_planes(frame, ("V", "H"), {"action": reads(known("rows", "limit"), scattered=True)})
    return frame.kernel


def merge_lines(machine: Machine, dtype: DType = F32) -> Kernel:
    """U[c] = S * V[c] for c in `rows`, in the listed lines alone. Buffers: V, mask, rows, lines, shape, U.

    `lines` is what `lists.touched_lines` writes: [0] their number, from 16 offsets into a plane, of cache lines.
    Other pixels of U keep what they had, which nobody reads. The rest as `merge`.
    """
    types = {"V": dtype, "mask": dtype, "rows": S32, "lines": S32, "shape": S32, "U": dtype}
    name = kernel_name(dtype, "merge_lines")
    with write_kernel(name, **types) as frame, _spans(frame, frame.lines[0]) as (row, first, last):
        plane = T.bind(i64(frame.rows[row + 1]) * i64(frame.shape[int(_Merge.SIZE)]))
        with T.serial(first, last) as index:
            line = T.bind(i64(frame.lines[index + LIST_HEAD]))
            _select_line(frame, frame.V, plane, line, machine)
        end = known("lines", "limit") - 1 + dtype.line
        elements = (known("rows", "limit") - 1) * entry(_Merge.SIZE) + end
        frame.states(
            {
                "V": reads(elements), "mask": reads(end), "rows": uses(ListKind.CHANNELS),
                "lines": uses(ListKind.LINES), "shape": reads(len(_Merge)), "U": writes(elements, over=("V",)),
            },
            spans_fit(known("rows", "count"), known("lines", "count")),
        )  # fmt: skip
    return frame.kernel


def _listed(frame: Frame) -> AbstractContextManager[tuple[Any, Any, Any]]:
    """Loop over this thread's share of the listed channels x lines of a plane."""
    return _spans(frame, tx.truncdiv(frame.shape[int(_Merge.SIZE)], frame.types["U"].line))


def _spans(frame: Frame, length: Any) -> AbstractContextManager[tuple[Any, Any, Any]]:
    return row_spans(frame, frame.rows[0], T.bind(length))


def _select_plane(frame: Frame, source: Any, plane: Any, span: tuple[Any, Any], machine: Machine) -> None:
    with T.serial(*span) as line:
        _select_line(frame, source, plane, T.bind(i64(line) * frame.types["U"].line), machine)


def _select_line(frame: Frame, source: Any, plane: Any, line: Any, machine: Machine) -> None:
    for within in range(0, frame.types["U"].line, machine.lanes):
        _select(frame, source, plane, line + within, machine)


def _select(frame: Frame, source: Any, plane: Any, pixel: Any, machine: Machine) -> None:
    """U = source where the mask is not 0, else 0: a vector of pixels of one plane."""
    lanes, zero = machine.lanes, constant(0.0, frame.types["U"], machine.lanes)
    active = tx.NE(load(frame.mask, pixel, lanes), zero)
    store(frame.U, plane + pixel, tx.Select(active, load(source, plane + pixel, lanes), zero), lanes)
