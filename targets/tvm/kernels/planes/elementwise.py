"""Kernels over contiguous elements: copies and elementwise operators.

They know nothing of planes. On whole planes an operator with f(0) = 0 keeps the pads zero, which all of these do.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.abi import Frame, Kernel, i64, share, write_kernel
from dvexport.targets.tvm.kernels.bounds import PARTS, ceil, entry, fits, reads, writes
from dvexport.targets.tvm.kernels.vectors import constant, cover, cover_blocks, load, row_spans, spans_fit, store
from dvexport.targets.tvm.machine.dtype import F32, S32, DType, kernel_name
from dvexport.targets.tvm.machine.machine import Machine

__all__ = ["add", "clear", "copy", "copy_shape", "elementwise_shape", "relu"]

_UNROLL = 4
"""Vectors of one turn of the loop: four loads are under way at a time."""


class _Copy(IntEnum):
    """Entries of `shape` of `copy`."""

    ROWS = 0
    COUNT = 1
    SOURCE = 2
    TARGET = 3


class _Elementwise(IntEnum):
    """Entries of `shape` of the other kernels."""

    COUNT = 0


def elementwise_shape(count: int) -> np.ndarray:
    """Return `shape` of the elementwise operators: number of elements."""
    return np.array([count], np.int32)


def copy_shape(count: int, rows: int = 1, source: int = 0, target: int = 0) -> np.ndarray:
    """Return `shape` of `copy`.

    Args:
        count: elements of a row.
        rows: how many.
        source, target: elements from the start of one row to that of the next, in X and in Y.
    """
    return np.array([rows, count, source, target], np.int32)


def copy(machine: Machine, dtype: DType = F32) -> Kernel:
    """Y = X, row by row: a tensor, a range of channels, or one part of a concatenation. Buffers: X, shape, Y.

    X and Y must not overlap. Threads share rows x vectors.
    """
    with write_kernel(kernel_name(dtype, "copy"), X=dtype, shape=S32, Y=dtype) as frame:
        rows, count = frame.extents((_Copy.ROWS, _Copy.COUNT))
        source, target = (T.bind(i64(frame.shape[int(place)])) for place in (_Copy.SOURCE, _Copy.TARGET))

        def vectors(place: Any, blocks: Any, lanes: int) -> None:
            with row_spans(frame, rows, T.bind(blocks)) as (row, first, last), T.serial(first, last) as index:
                at = T.bind(i64(place(index)))
                store(frame.Y, i64(row) * target + at, load(frame.X, i64(row) * source + at, lanes), lanes)

        cover(count, machine.lanes, vectors)
        all_rows, elements, from_row, to_row = map(entry, _Copy)
        frame.states(
            {
                "X": reads((all_rows - 1) * from_row + elements),
                "shape": reads(len(_Copy)),
                "Y": writes((all_rows - 1) * to_row + elements),
            },
            spans_fit(all_rows, cover_blocks(elements, machine.lanes)),
        )
    return frame.kernel


def clear(machine: Machine, dtype: DType = F32) -> Kernel:
    """Y = 0. Buffers: shape, Y. Threads share vectors."""
    with write_kernel(kernel_name(dtype, "clear"), shape=S32, Y=dtype) as frame:

        def vectors(place: Any, blocks: Any, lanes: int) -> None:
            low, high = share(T.bind(blocks), frame.part, frame.parts)
            with T.serial(low, high) as index:
                store(frame.Y, i64(place(index)), constant(0.0, dtype, lanes), lanes)

        (count,) = frame.extents(_Elementwise)
        cover(count, machine.lanes, vectors)
        elements = entry(_Elementwise.COUNT)
        frame.states({"shape": reads(1), "Y": writes(elements)}, fits(cover_blocks(elements, machine.lanes) * PARTS))
    return frame.kernel


def relu(machine: Machine, dtype: DType = F32) -> Kernel:
    """Y = max(X, 0). Buffers: X, shape, Y; Y may be X."""
    return _elementwise("relu", machine, dtype, ("X",), lambda lanes, x: tx.max(x, constant(0.0, dtype, lanes)))


def add(machine: Machine, dtype: DType = F32) -> Kernel:
    """Y = X + Z. Buffers: X, Z, shape, Y; Y may be X or Z."""
    return _elementwise("add", machine, dtype, ("X", "Z"), lambda lanes, x, z: x + z)


def _elementwise(
    name: str, machine: Machine, dtype: DType, inputs: tuple[str, ...], operator: Callable[..., Any]
) -> Kernel:
    """Write Y[i] = operator(lanes, X[i], ...). Nothing is handled twice, so Y may be an input."""
    types = dict.fromkeys(inputs, dtype)
    with write_kernel(kernel_name(dtype, name), **types, shape=S32, Y=dtype) as frame:
        (count,), block = frame.extents(_Elementwise), machine.lanes * _UNROLL
        low, high = share(tx.truncdiv(count, block), frame.part, frame.parts)
        with T.serial(low, high) as index:
            _apply(frame, inputs, operator, T.bind(i64(index) * block), machine.lanes, _UNROLL)
        with T.If(tx.EQ(frame.part, frame.parts - 1)), T.Then():
            done = T.bind(high * block)
            vectors = T.bind(tx.truncdiv(count - done, machine.lanes))
            with T.serial(0, vectors) as index:
                _apply(frame, inputs, operator, T.bind(i64(done + index * machine.lanes)), machine.lanes, 1)
            with T.serial(done + vectors * machine.lanes, count) as index:
                _apply(frame, inputs, operator, i64(index), 1, 1)
        elements = entry(_Elementwise.COUNT)
        stated = {name: reads(elements) for name in inputs} | {"shape": reads(1)}
        frame.states(stated | {"Y": writes(elements, over=inputs)}, fits(ceil(elements, block) * PARTS))
    return frame.kernel


def _apply(
    frame: Frame, inputs: tuple[str, ...], operator: Callable[..., Any], at: Any, lanes: int, times: int
) -> None:
    places = [at + step * lanes for step in range(times)]
    values = [T.bind(operator(lanes, *(load(frame.buffers[key], place, lanes) for key in inputs))) for place in places]
    for place, value in zip(places, values, strict=True):
        store(frame.Y, place, value, lanes)
