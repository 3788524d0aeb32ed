"""Matrix products of few rows: the classifier and the policies. They are bound by reading the weights once.

Weights are packed at export as [blocks][K][block] with a block of 1, 2, 4 or 8 vectors of outputs, so one block is one
ascending stream. Its products are summed in registers over all of K, for up to 4 rows of X at a time; with fewer
rows several K are under way at a time. Threads share blocks.

What a ReLU has made is to a good part zero. A kernel that *skips* first lists the K whose X is not, and reads the
weights of those alone; it takes one row of X.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.abi import Frame, Kernel, i64, share, write_kernel
from dvexport.targets.tvm.kernels.bounds import PARTS, ceil, entry, fits, reads, size, writes
from dvexport.targets.tvm.kernels.vectors import ceil_div, constant, int32, load, register, splat, store
from dvexport.targets.tvm.machine.dtype import F32, S32, DType, require_dtype
from dvexport.targets.tvm.machine.machine import Machine

__all__ = ["Dense", "dense", "dense_bias", "dense_scratch", "dense_shape", "dense_spec", "dense_weights"]

_WASTE = 1.15
"""Padded outputs over outputs that a wider block may cost."""


_ENTRIES = S32.line
"""Entries of scratch that are laid out together: those of a cache line."""


class _Shape(IntEnum):
    """Entries of `shape`."""

    ROWS = 0
    OUTPUTS = 1
    INPUTS = 2


@dataclass(frozen=True)
class Dense:
    """What a kernel is generated for.

    Attributes:
        vectors: how many vectors of outputs a block has: 1, 2 or 4; 8 too where zeros are skipped.
        relu: whether Y = max(Y, 0).
        skips: whether zeros of X are left out; for one row.
        dtype: the type of X, weights and sums.
    """

    vectors: int
    relu: bool = False
    skips: bool = False
    dtype: DType = F32

    @property
    def name(self) -> str:
        """The kernel's symbol."""
        marks = [mark for mark in ("skips", "relu") if getattr(self, mark)]
        return "_".join([f"{self.dtype}_dense_v{self.vectors}", *marks])


def dense_spec(outputs: int, machine: Machine, *, relu: bool = False, skips: bool = False, dtype: DType = F32) -> Dense:
    """Return the spec for a number of outputs: the widest block that pads them by little."""
    padded = {vectors: _padded(outputs, vectors * machine.lanes) for vectors in (8, 4, 2, 1)}
    widest = _registers(machine)[0] * (2 if skips else 1)  # what is skipped should be whole pieces of memory
    fitting = [v for v, size in padded.items() if v <= widest and size <= padded[1] * _WASTE]
    return Dense(fitting[0], relu, skips, dtype)


def dense_weights(weights: np.ndarray, spec: Dense, machine: Machine) -> np.ndarray:
    """Pack W `[N, K]` for the weights file: `[blocks, K, block]`, absent outputs zero."""
    outputs, inputs = weights.shape
    block = spec.vectors * machine.lanes
    padded = np.zeros((_padded(outputs, block), inputs), spec.dtype.array)
    padded[:outputs] = weights
    return np.ascontiguousarray(padded.reshape(-1, block, inputs).transpose(0, 2, 1))


def dense_bias(bias: np.ndarray, spec: Dense, machine: Machine) -> np.ndarray:
    """Pad B `[N]` with zeros to whole blocks."""
    padded = np.zeros(_padded(len(bias), spec.vectors * machine.lanes), spec.dtype.array)
    padded[: len(bias)] = bias
    return padded


def dense_shape(rows: int, outputs: int, inputs: int) -> np.ndarray:
    """Return `shape` of `dense`: M, N and K."""
    return np.array([rows, outputs, inputs], np.int32)


def dense_scratch(inputs: int, threads: int) -> int:
    """Return the int32 elements of `scratch` of a kernel that skips, for `threads` parts."""
    return threads * (-(-inputs // _ENTRIES) + 1) * _ENTRIES


def _padded(outputs: int, block: int) -> int:
    return -(-outputs // block) * block


def _registers(machine: Machine) -> tuple[int, int]:
    """Return the most vectors and rows of a block of sums, which must leave registers for weights and X."""
    return (4, 4) if machine.registers == 32 else (2, 4)


def dense(spec: Dense, machine: Machine) -> Kernel:
    """Y `[M, N]` = X `[M, K]` W^T + B.

    Buffers: X, W, B, scratch (`dense_scratch`, of one that skips), shape, Y; W and B as packed above.

    Raises:
        UsageError: it computes in an element type that there is no code for.
    """
    require_dtype("dense", spec.dtype)
    types = dict.fromkeys(["X", "W", "B"], spec.dtype) | ({"scratch": S32} if spec.skips else {})
    with write_kernel(spec.name, **types, shape=S32, Y=spec.dtype) as frame:
        rows, outputs = frame.extents((_Shape.ROWS, _Shape.OUTPUTS))
        low, high = share(ceil_div(outputs, spec.vectors * machine.lanes), frame.part, frame.parts)
        if spec.skips:
            nonzero = _nonzero(frame)
            with T.serial(low, high) as block:
                _product(frame, spec, machine, (block, int32(0)), 1, nonzero)
        else:
            most = _registers(machine)[1]
            with T.serial(low, high) as block:
                with T.serial(0, tx.truncdiv(rows, most)) as group:
                    _product(frame, spec, machine, (block, T.bind(group * most)), most)
                for left in range(1, most):
                    with T.If(tx.EQ(tx.truncmod(rows, most), left)), T.Then():
                        _product(frame, spec, machine, (block, T.bind(rows - left)), left)
        _states(frame, spec, machine)
    return frame.kernel


def _states(frame: Frame, spec: Dense, machine: Machine) -> None:
    count, outputs, inputs = map(entry, _Shape)
    rows = size(1) if spec.skips else count
    width = spec.vectors * machine.lanes
    blocks = ceil(outputs, width)
    stated = {"X": reads(rows * inputs), "W": reads(blocks * width * inputs), "B": reads(blocks * width)}
    if spec.skips:
        stated["scratch"] = writes((PARTS - 1) * ((ceil(inputs, _ENTRIES) + 1) * _ENTRIES) + inputs)
    stated |= {"shape": reads(len(_Shape)), "Y": writes(rows * outputs)}
    frame.states(stated, fits(blocks * PARTS, outputs + width, inputs + _ENTRIES, count))


@dataclass(frozen=True)
class _Nonzero:
    """The K of which X is not zero: `count` of them, listed from `start`."""

    start: Any
    count: Any


def _nonzero(frame: Frame) -> _Nonzero:
    """List them in this thread's part of scratch; branch-free, as half of them would be guessed wrong."""
    (size,) = frame.extents((_Shape.INPUTS,))
    start = T.bind(i64(frame.part) * i64(ceil_div(size, _ENTRIES) * _ENTRIES + _ENTRIES))
    end = register(S32, 1)
    T.buffer_store(end, int32(0), [0])
    with T.serial(0, size) as k:
        T.buffer_store(frame.scratch, k, [start + i64(end[0])])
        found = tx.Cast(S32.tvm, tx.NE(frame.X[i64(k)], constant(0.0, frame.types["X"])))
        T.buffer_store(end, end[0] + found, [0])
    return _Nonzero(start, T.bind(end[0]))


def _product(
    frame: Frame, spec: Dense, machine: Machine, place: tuple[Any, Any], rows: int, nonzero: _Nonzero | None = None
) -> None:
    """Compute `rows` rows of one block of outputs; `place` is (block, first row)."""
    lanes, (block, row) = machine.lanes, place
    width = spec.vectors * lanes
    chains = max(1, 8 // (rows * spec.vectors))
    sums = [[[register(spec.dtype, lanes) for _ in range(spec.vectors)] for _ in range(rows)] for _ in range(chains)]
    first = T.bind(i64(block) * width)
    for chain in range(chains):
        for vector in range(spec.vectors):
            bias = (
                T.bind(load(frame.B, first + vector * lanes, lanes)) if chain == 0 else constant(0.0, spec.dtype, lanes)
            )
            for each in range(rows):
                store(sums[chain][each][vector], 0, bias, lanes)
    (size,) = frame.extents((_Shape.INPUTS,))
    weights, source = T.bind(first * i64(size)), T.bind(i64(row) * i64(size))
    _accumulate(frame, sums, (weights, source, size), lanes, nonzero)
    values = [
        [_finish([chain[each][v] for chain in sums], spec, lanes) for v in range(spec.vectors)] for each in range(rows)
    ]
    _write(frame, values, first, T.bind(i64(row) * i64(frame.shape[int(_Shape.OUTPUTS)]) + first), lanes)


def _accumulate(frame: Frame, sums: Any, places: tuple[Any, Any, Any], lanes: int, nonzero: _Nonzero | None) -> None:
    """Add the products of all K, or of the listed ones: `places` is (first weight, first X, K)."""
    weights, source, size = places
    chains, rows, vectors = len(sums), len(sums[0]), len(sums[0][0])
    width = vectors * lanes

    def step(k: Any, chain: int) -> None:
        row = T.bind(weights + k * width)
        columns = [T.bind(load(frame.W, row + vector * lanes, lanes)) for vector in range(vectors)]
        for each in range(rows):
            value = T.bind(splat(frame.X[source + i64(size) * each + k], lanes))
            for vector, column in enumerate(columns):
                total = sums[chain][each][vector]
                store(total, 0, load(total, 0, lanes) + value * column, lanes)

    def place(index: Any) -> Any:
        return T.bind(i64(index if nonzero is None else frame.scratch[nonzero.start + i64(index)]))

    count = size if nonzero is None else nonzero.count
    turns = T.bind(tx.truncdiv(count, chains))
    with T.serial(0, turns) as turn:
        for chain in range(chains):
            step(place(turn * chains + chain), chain)
    if chains > 1:
        with T.serial(turns * chains, count) as index:
            step(place(index), 0)


def _finish(chains: list[Any], spec: Dense, lanes: int) -> Any:
    value = load(chains[0], 0, lanes)
    for chain in chains[1:]:
        value = value + load(chain, 0, lanes)
    return T.bind(tx.max(value, constant(0.0, spec.dtype, lanes)) if spec.relu else value)


def _write(frame: Frame, values: list[list[Any]], first: Any, target: Any, lanes: int) -> None:
    """Store rows of a block from `target`; of the last block, through a buffer, the outputs that exist."""
    outputs, width = i64(frame.shape[int(_Shape.OUTPUTS)]), len(values[0]) * lanes
    with T.If(first + width <= outputs):
        with T.Then():
            for each, row in enumerate(values):
                for vector, value in enumerate(row):
                    store(frame.Y, target + outputs * each + vector * lanes, value, lanes)
        with T.Else():
            edges = [register(frame.types["Y"], width) for _ in values]
            for each, row in enumerate(values):
                for vector, value in enumerate(row):
                    store(edges[each], vector * lanes, value, lanes)
            with T.serial(0, tx.Cast(S32.tvm, outputs - first)) as column:
                for each, edge in enumerate(edges):
                    value = edge[tx.bitwise_and(column, width - 1)]  # mask: no call of memcpy
                    store(frame.Y, target + outputs * each + i64(column), value, 1)
