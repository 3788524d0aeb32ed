"""Kernels over tokens: layer normalisation, the choice of those that go on, and notes of where they went."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.abi import Frame, Kernel, i64, share, write_kernel
from dvexport.targets.tvm.kernels.bounds import PARTS, entry, fits, reads, writes
from dvexport.targets.tvm.kernels.vectors import constant, cover, load, register, row_spans, spans_fit, splat, store
from dvexport.targets.tvm.machine.dtype import F32, S32, S64, DType, kernel_name
from dvexport.targets.tvm.machine.machine import Machine

__all__ = ["layer_norm", "layer_norm_shape", "scatter", "scatter_shape", "select_shape", "select_tokens"]

_CHAINS = 4
_INFINITY_BITS = 0x7F800000


class _Norm(IntEnum):
    """Entries of `shape` of `layer_norm`."""

    ROWS = 0
    COLUMNS = 1


class _Choice(IntEnum):
    """Entries of `shape` of `select_tokens`."""

    BATCHES = 0
    TOKENS = 1
    CHANNELS = 2
    KEEP = 3


class _Scatter(IntEnum):
    """Entries of `shape` of `scatter`."""

    ROWS = 0
    COUNT = 1
    UPDATES = 2


def layer_norm_shape(rows: int, columns: int) -> np.ndarray:
    """Return `shape` of `layer_norm`."""
    return np.array([rows, columns], np.int32)


def layer_norm(machine: Machine, dtype: DType = F32) -> Kernel:
    """Y = (X - mean) / sqrt(variance + eps) * W + B of every row. Buffers: X, W, B, eps `[1]`, shape, Y.

    The variance is that of the differences from the mean, summed in a second pass over the row, which is in the cache.
    """
    lanes = machine.lanes
    types = dict.fromkeys(["X", "W", "B", "eps"], dtype)
    with write_kernel(kernel_name(dtype, "layer_norm"), **types, shape=S32, Y=dtype) as frame:
        (columns,) = frame.extents((_Norm.COLUMNS,))
        part = T.bind(constant(1.0, dtype) / tx.Cast(dtype.tvm, columns))
        whole = T.bind(tx.truncdiv(columns, lanes))
        low, high = share(frame.shape[int(_Norm.ROWS)], frame.part, frame.parts)
        with T.serial(low, high) as row:
            start = T.bind(i64(row) * i64(columns))
            mean = T.bind(_sum(frame, start, columns, whole, lanes, lambda value, width: value) * part)

            def square(value: Any, width: int, mean: Any = mean) -> Any:
                less = T.bind(value - splat(mean, width))
                return less * less

            variance = T.bind(_sum(frame, start, columns, whole, lanes, square) * part)
            factor = T.bind(constant(1.0, dtype) / tx.sqrt(variance + frame.eps[0]))

            def write(at: Any, width: int, start: Any = start, mean: Any = mean, factor: Any = factor) -> None:
                value = (load(frame.X, start + at, width) - splat(mean, width)) * splat(factor, width)
                value = value * load(frame.W, at, width) + load(frame.B, at, width)
                store(frame.Y, start + at, value, width)

            with T.serial(0, whole) as vector:
                write(T.bind(i64(vector) * lanes), lanes)
            with T.serial(whole * lanes, columns) as each:
                write(T.bind(i64(each)), 1)
        rows, width = map(entry, _Norm)
        stated = {"X": reads(rows * width), "W": reads(width), "B": reads(width), "eps": reads(1)}
        stated |= {"shape": reads(len(_Norm))}
        frame.states(stated | {"Y": writes(rows * width)}, fits(rows * PARTS))
    return frame.kernel


def _sum(frame: Frame, start: Any, columns: Any, whole: Any, lanes: int, function: Any) -> Any:
    """Sum a function of the elements of a row of X, several vectors at a time."""
    x, dtype = frame.X, frame.types["X"]
    chains, rest = [register(dtype, lanes) for _ in range(_CHAINS)], register(dtype, 1)
    for chain in chains:
        store(chain, 0, constant(0.0, dtype, lanes), lanes)
    store(rest, 0, constant(0.0, dtype), 1)
    turns = T.bind(tx.truncdiv(whole, _CHAINS))

    def add(chain: Any, vector: Any) -> None:
        value = T.bind(load(x, start + vector * lanes, lanes))
        store(chain, 0, load(chain, 0, lanes) + function(value, lanes), lanes)

    with T.serial(0, turns) as turn:
        for index, chain in enumerate(chains):
            add(chain, i64(turn) * _CHAINS + index)
    with T.serial(turns * _CHAINS, whole) as vector:
        add(chains[0], i64(vector))
    with T.serial(whole * lanes, columns) as each:
        store(rest, 0, rest[0] + function(T.bind(x[start + i64(each)]), 1), 1)
    for chain in chains[1:]:
        store(chains[0], 0, load(chains[0], 0, lanes) + load(chain, 0, lanes), lanes)
    half = lanes // 2
    while half:
        store(chains[0], 0, load(chains[0], 0, half) + load(chains[0], half, half), half)
        half //= 2
    return T.bind(chains[0][0] + rest[0])


def select_shape(batches: int, tokens: int, channels: int, keep: int) -> np.ndarray:
    """Return `shape` of `select_tokens`."""
    return np.array([batches, tokens, channels, keep], np.int32)


def select_tokens(machine: Machine, dtype: DType = F32) -> Kernel:
    """`dv.SelectTokens`. Buffers: X `[B, N, C]`, score `[B, N]`, shape, index int64 `[B, keep]`, kept.

    A token's place in the order is the number of tokens that come before it. Each is counted alone, so threads share
    tokens, write what they find, and need neither a sort nor one another. NaN counts as infinite.
    """
    lanes = machine.lanes
    types = {"X": dtype, "score": dtype, "shape": S32, "index": S64, "kept": dtype}
    with write_kernel(kernel_name(dtype, "select_tokens"), **types) as frame:
        batches, tokens, channels, keep = frame.extents(_Choice)
        low, high = share(batches * tokens, frame.part, frame.parts)
        with T.serial(low, high) as item:
            batch, token = T.bind(tx.truncdiv(item, tokens)), T.bind(tx.truncmod(item, tokens))
            first = T.bind(i64(batch) * i64(tokens))
            own = T.bind(_score(frame.score[first + i64(token)], 1))
            place = T.bind(_place(frame, first, (own, token, tokens), lanes))
            with T.If(place < keep), T.Then():
                target = T.bind(i64(batch) * i64(keep) + i64(place))
                store(frame.index, target, i64(token), 1)
                source, to = T.bind((first + i64(token)) * i64(channels)), T.bind(target * i64(channels))

                def copy(at: Any, count: Any, width: int, source: Any = source, to: Any = to) -> None:
                    with T.serial(0, count) as index:
                        offset = T.bind(i64(at(index)))
                        store(frame.kept, to + offset, load(frame.X, source + offset, width), width)

                cover(channels, lanes, copy)
        count, of, width, kept = map(entry, _Choice)
        frame.states(
            {
                "X": reads(count * of * width), "score": reads(count * of), "shape": reads(len(_Choice)),
                "index": writes(count * kept), "kept": writes(count * kept * width),
            },
            fits(count * of * PARTS, width + lanes),
        )  # fmt: skip
    return frame.kernel


def _score(value: Any, width: int) -> Any:
    """Return an `f32` score, infinity for NaN; the test is on the bits, as TVM takes x != x for false."""
    mask, infinity = (constant(number, S32, width) for number in (0x7FFFFFFF, _INFINITY_BITS))
    bits = tx.bitwise_and(tx.reinterpret(S32.vector(width), value), mask)
    infinite = tx.reinterpret(F32.vector(width), infinity)
    return tx.Select(tx.GT(bits, infinity), infinite, value)


def _place(frame: Frame, first: Any, of: tuple[Any, Any, Any], lanes: int) -> Any:
    """Count the tokens that come before one: those with a smaller score, or with the same score and a lower index."""
    own, token, tokens = of
    count, rest = register(S32, lanes), register(S32, 1)

    def before(at: Any, width: int) -> Any:
        other = T.bind(_score(load(frame.score, first + i64(at), width), width))
        mine, me = splat(own, width), splat(token, width)
        index = tx.Ramp(at, 1, width) if width > 1 else at
        earlier = tx.And(tx.EQ(other, mine), tx.LT(index, me))
        return tx.Select(tx.Or(tx.LT(other, mine), earlier), constant(1, S32, width), constant(0, S32, width))

    store(count, 0, constant(0, S32, lanes), lanes)
    store(rest, 0, constant(0, S32), 1)
    whole = T.bind(tx.truncdiv(tokens, lanes))
    with T.serial(0, whole) as vector:
        store(count, 0, load(count, 0, lanes) + before(T.bind(vector * lanes), lanes), lanes)
    with T.serial(whole * lanes, tokens) as each:
        store(rest, 0, rest[0] + before(each, 1), 1)
    half = lanes // 2
    while half:
        store(count, 0, load(count, 0, half) + load(count, half, half), half)
        half //= 2
    return count[0] + rest[0]


def scatter_shape(rows: int, count: int, updates: int) -> np.ndarray:
    """Return `shape` of `scatter`."""
    return np.array([rows, count, updates], np.int32)


def scatter(dtype: DType) -> Kernel:
    """Y = X with Y[r, index[r, k]] = U[r, k]. Buffers: X `[R, N]`, index int64 `[R, K]`, U `[R, K]`, shape, Y.

    The last of equal indices holds. An index below 0 counts from the end; one that is not in the row is left out.
    Threads share the elements of Y, and each looks at all indices of its rows.
    """
    types = {"X": dtype, "index": S64, "U": dtype, "shape": S32, "Y": dtype}
    with write_kernel(f"{dtype}_scatter", **types) as frame:
        count, updates = frame.extents((_Scatter.COUNT, _Scatter.UPDATES))
        with row_spans(frame, frame.shape[int(_Scatter.ROWS)], count) as (row, low, high):
            start, first = T.bind(i64(row) * i64(count)), T.bind(i64(row) * i64(updates))
            with T.serial(low, high) as each:
                store(frame.Y, start + i64(each), frame.X[start + i64(each)], 1)
            with T.serial(0, updates) as each:
                place = T.bind(frame.index[first + i64(each)])
                place = T.bind(place + tx.Select(place < 0, i64(count), i64(0)))
                with T.If(tx.And(place >= i64(low), place < i64(high))), T.Then():
                    store(frame.Y, start + place, frame.U[first + i64(each)], 1)
        rows, width, changes = map(entry, _Scatter)
        stated = {"X": reads(rows * width), "index": reads(rows * changes), "U": reads(rows * changes)}
        frame.states(stated | {"shape": reads(len(_Scatter)), "Y": writes(rows * width)}, spans_fit(rows, width))
    return frame.kernel
