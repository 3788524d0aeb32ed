"""Kernels over contiguous floats: copies and elementwise operators.

They know nothing of planes. On whole planes an operator with f(0) = 0 keeps the pads zero, which all of these do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.abi import Frame, Kernel, i64, share, write_kernel
from dvexport.targets.tvm.kernels.bounds import PARTS, ceil, entry, fits, reads, writes
from dvexport.targets.tvm.kernels.vectors import cover, cover_blocks, load, row_spans, spans_fit, splat, store
from dvexport.targets.tvm.machine.machine import Machine

__all__ = ["add", "add_relu", "clear", "clip", "copy", "copy_shape", "elementwise_shape", "mul", "relu"]

_UNROLL = 4
"""Vectors of one turn of the loop: four loads are under way at a time."""


def elementwise_shape(count: int) -> np.ndarray:
    """Return `shape` of the elementwise operators: number of floats."""
    return np.array([count], np.int32)


def copy_shape(count: int, rows: int = 1, source: int = 0, target: int = 0) -> np.ndarray:
    """Return `shape` of `copy`.

    Args:
        count: floats of a row.
        rows: how many.
        source, target: floats from the start of one row to that of the next, in X and in Y.
    """
    return np.array([rows, count, source, target], np.int32)


def copy(machine: Machine) -> Kernel:
    """Y = X, row by row: a tensor, a range of channels, or one part of a concatenation. Buffers: X, shape, Y.

    X and Y must not overlap. Threads share rows x vectors.
    """
    with write_kernel("copy", X="float32", shape="int32", Y="float32") as frame:
        rows, count = T.bind(frame.shape[0]), T.bind(frame.shape[1])
        source, target = (T.bind(i64(frame.shape[index])) for index in (2, 3))

        def vectors(place: Any, blocks: Any, lanes: int) -> None:
            with row_spans(frame, rows, T.bind(blocks)) as (row, first, last), T.serial(first, last) as index:
                at = T.bind(i64(place(index)))
                store(frame.Y, i64(row) * target + at, load(frame.X, i64(row) * source + at, lanes), lanes)

        cover(count, machine.lanes, vectors)
        all_rows, floats, from_row, to_row = map(entry, range(4))
        frame.states(
            {
                "X": reads((all_rows - 1) * from_row + floats),
                "shape": reads(4),
                "Y": writes((all_rows - 1) * to_row + floats),
            },
            spans_fit(all_rows, cover_blocks(floats, machine.lanes)),
        )
    return frame.kernel


def clear(machine: Machine) -> Kernel:
    """Y = 0. Buffers: shape, Y. Threads share vectors."""
    with write_kernel("clear", shape="int32", Y="float32") as frame:

        def vectors(place: Any, blocks: Any, lanes: int) -> None:
            low, high = share(T.bind(blocks), frame.part, frame.parts)
            with T.serial(low, high) as index:
                store(frame.Y, i64(place(index)), splat(0.0, lanes), lanes)

        cover(T.bind(frame.shape[0]), machine.lanes, vectors)
        floats = entry(0)
        frame.states({"shape": reads(1), "Y": writes(floats)}, fits(cover_blocks(floats, machine.lanes) * PARTS))
    return frame.kernel


def relu(machine: Machine) -> Kernel:
    """Y = max(X, 0). Buffers: X, shape, Y; Y may be X."""
    return _elementwise("relu", machine, ("X",), _relu)


def add(machine: Machine) -> Kernel:
    """Y = X + Z. Buffers: X, Z, shape, Y; Y may be X or Z."""
    return _elementwise("add", machine, ("X", "Z"), lambda lanes, x, z: x + z)


def add_relu(machine: Machine) -> Kernel:
    """Y = max(X + Z, 0). Buffers: X, Z, shape, Y; Y may be X or Z."""
    return _elementwise("add_relu", machine, ("X", "Z"), lambda lanes, x, z: _relu(lanes, x + z))


def mul(machine: Machine) -> Kernel:
    """Y = X * Z. Buffers: X, Z, shape, Y; Y may be X or Z."""
    return _elementwise("mul", machine, ("X", "Z"), lambda lanes, x, z: x * z)


def clip(low: float, high: float, machine: Machine) -> Kernel:
    """Y = min(max(X, low), high), as ReLU6. Buffers: X, shape, Y; Y may be X. 0 must be in [low, high] for planes."""
    name = f"clip_{np.float32(low).view(np.uint32):08x}_{np.float32(high).view(np.uint32):08x}"
    return _elementwise(
        name, machine, ("X",), lambda lanes, x: tx.min(tx.max(x, splat(low, lanes)), splat(high, lanes))
    )


def _relu(lanes: int, value: Any) -> Any:
    return tx.max(value, splat(0.0, lanes))


def _elementwise(name: str, machine: Machine, inputs: tuple[str, ...], operator: Callable[..., Any]) -> Kernel:
    """Write Y[i] = operator(lanes, X[i], ...). Nothing is handled twice, so Y may be an input."""
    types = dict.fromkeys(inputs, "float32")
    with write_kernel(name, **types, shape="int32", Y="float32") as frame:
        count, block = T.bind(frame.shape[0]), machine.lanes * _UNROLL
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
        stated = {name: reads(entry(0)) for name in inputs} | {"shape": reads(1)}
        frame.states(stated | {"Y": writes(entry(0), over=inputs)}, fits(ceil(entry(0), block) * PARTS))
    return frame.kernel


def _apply(
    frame: Frame, inputs: tuple[str, ...], operator: Callable[..., Any], at: Any, lanes: int, times: int
) -> None:
    places = [at + step * lanes for step in range(times)]
    values = [T.bind(operator(lanes, *(load(frame.buffers[key], place, lanes) for key in inputs))) for place in places]
    for place, value in zip(places, values, strict=True):
        store(frame.Y, place, value, lanes)
