"""Matrix products of few rows: the classifier and the policies. They are bound by reading the weights once.

Weights are packed at export as [blocks][K][block] with a block of 1, 2, 4 or 8 vectors of outputs, so one block is one
ascending stream. Its products are summed in registers over all of K, for up to 4 rows of X at a time; with fewer
rows several K are under way at a time. Threads share blocks.

What a ReLU has made is to a good part zero. A kernel that *skips* first lists the K whose X is not, and reads the
weights of those alone; it takes one row of X.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.abi import Frame, Kernel, i64, share, write_kernel
from dvexport.targets.tvm.kernels.bounds import PARTS, ceil, entry, fits, reads, size, writes
from dvexport.targets.tvm.kernels.vectors import ceil_div, load, splat, store
from dvexport.targets.tvm.machine.machine import Machine

__all__ = ["Dense", "dense", "dense_bias", "dense_scratch", "dense_shape", "dense_spec", "dense_weights"]

_LINE = 16
"""Elements of a cache line."""

_WASTE = 1.15
"""Padded outputs over outputs that a wider block may cost."""


@dataclass(frozen=True)
class Dense:
    """What a kernel is generated for.

    Attributes:
        vectors: of outputs in a block: 1, 2 or 4; 8 too of one that skips.
        segments: X is this many tensors side by side, such as the state and the mean that a policy reads.
        relu: whether Y = max(Y, 0).
        skips: whether zeros of X are left out; of one row and one segment.
    """

    vectors: int
    segments: int = 1
    relu: bool = False
    skips: bool = False

    @property
    def name(self) -> str:
        """The kernel's symbol."""
        marks = [mark for mark in ("skips", "relu") if getattr(self, mark)]
        return "_".join([f"dense_v{self.vectors}_x{self.segments}", *marks])


def dense_spec(outputs: int, machine: Machine, *, segments: int = 1, relu: bool = False, skips: bool = False) -> Dense:
    """Return the spec for a number of outputs: the widest block that pads them by little."""
    padded = {vectors: _padded(outputs, vectors * machine.lanes) for vectors in (8, 4, 2, 1)}
    widest = _registers(machine)[0] * (2 if skips else 1)  # what is skipped should be whole pieces of memory
    fitting = [v for v, size in padded.items() if v <= widest and size <= padded[1] * _WASTE]
    return Dense(fitting[0], segments, relu, skips)


def dense_weights(weights: np.ndarray, spec: Dense, machine: Machine) -> np.ndarray:
    """Pack W `[N, K]` for the weights file: float32 `[blocks, K, block]`, absent outputs zero."""
    outputs, inputs = weights.shape
    block = spec.vectors * machine.lanes
    padded = np.zeros((_padded(outputs, block), inputs), np.float32)
    padded[:outputs] = weights
    return np.ascontiguousarray(padded.reshape(-1, block, inputs).transpose(0, 2, 1))


def dense_bias(bias: np.ndarray, spec: Dense, machine: Machine) -> np.ndarray:
    """Pad B `[N]` with zeros to whole blocks."""
    padded = np.zeros(_padded(len(bias), spec.vectors * machine.lanes), np.float32)
    padded[: len(bias)] = bias
    return padded


def dense_shape(rows: int, outputs: int, inputs: tuple[int, ...]) -> np.ndarray:
    """Return `shape` of `dense`: M, N, all of K, and the K of each segment."""
    return np.array([rows, outputs, sum(inputs), *inputs], np.int32)


def dense_scratch(inputs: int, threads: int) -> int:
    """Return the int32 elements of `scratch` of a kernel that skips, for `threads` parts."""
    return threads * (-(-inputs // _LINE) * _LINE + _LINE)


def _padded(outputs: int, block: int) -> int:
    return -(-outputs // block) * block


def _registers(machine: Machine) -> tuple[int, int]:
    """Return the most vectors and rows of a block of sums, which must leave registers for weights and X."""
    return (4, 4) if machine.registers == 32 else (2, 4)


def dense(spec: Dense, machine: Machine) -> Kernel:
    """Y `[M, N]` = X `[M, K]` W^T + B.

    Buffers: X0 (, X1), W, B, scratch (`dense_scratch`, of one that skips), shape, Y; W and B as packed above.
    """
    inputs = [f"X{index}" for index in range(spec.segments)]
    types = dict.fromkeys([*inputs, "W", "B"], "float32") | ({"scratch": "int32"} if spec.skips else {})
    with write_kernel(spec.name, **types, shape="int32", Y="float32") as frame:
        rows, outputs = T.bind(frame.shape[0]), T.bind(frame.shape[1])
        low, high = share(ceil_div(outputs, spec.vectors * machine.lanes), frame.part, frame.parts)
        if spec.skips:
            nonzero = _nonzero(frame)
            with T.serial(low, high) as block:
                _product(frame, spec, machine, (block, tx.IntImm("int32", 0)), 1, nonzero)
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
    count, outputs, depth = map(entry, range(3))
    rows = size(1) if spec.skips else count
    segments = [entry(3 + index) for index in range(spec.segments)]
    width = spec.vectors * machine.lanes
    blocks, inputs = ceil(outputs, width), functools.reduce(operator.add, segments)
    stated = {f"X{index}": reads(rows * each) for index, each in enumerate(segments)}
    stated |= {"W": reads((blocks - 1) * width * depth + inputs * width), "B": reads(blocks * width)}
    if spec.skips:
        stated["scratch"] = writes((PARTS - 1) * ((ceil(inputs, _LINE) + 1) * _LINE) + inputs)
    stated |= {"shape": reads(3 + spec.segments), "Y": writes(rows * outputs)}
    frame.states(stated, fits(blocks * PARTS, outputs + width, inputs + _LINE, count))


@dataclass(frozen=True)
class _Nonzero:
    """The K of which X is not zero: `count` of them, listed from `start`."""

    start: Any
    count: Any


def _nonzero(frame: Frame) -> _Nonzero:
    """List them in this thread's part of scratch; branch-free, as half of them would be guessed wrong."""
    size = T.bind(frame.shape[3])
    start = T.bind(i64(frame.part) * i64(tx.truncdiv(size + (_LINE - 1), _LINE) * _LINE + _LINE))
    end = T.alloc_buffer((1,), "int32", scope="global")
    T.buffer_store(end, tx.IntImm("int32", 0), [0])
    with T.serial(0, size) as k:
        T.buffer_store(frame.scratch, k, [start + i64(end[0])])
        found = tx.Cast("int32", tx.NE(frame.X0[i64(k)], tx.FloatImm("float32", 0.0)))
        T.buffer_store(end, end[0] + found, [0])
    return _Nonzero(start, T.bind(end[0]))


def _product(
    frame: Frame, spec: Dense, machine: Machine, place: tuple[Any, Any], rows: int, nonzero: _Nonzero | None = None
) -> None:
    """Compute `rows` rows of one block of outputs; `place` is (block, first row)."""
    lanes, (block, row) = machine.lanes, place
    width = spec.vectors * lanes
    chains = max(1, 8 // (rows * spec.vectors))
    sums = [
        [[T.alloc_buffer((lanes,), "float32", scope="global") for _ in range(spec.vectors)] for _ in range(rows)]
        for _ in range(chains)
    ]
    first = T.bind(i64(block) * width)
    for chain in range(chains):
        for vector in range(spec.vectors):
            bias = T.bind(load(frame.B, first + vector * lanes, lanes)) if chain == 0 else splat(0.0, lanes)
            for each in range(rows):
                store(sums[chain][each][vector], 0, bias, lanes)
    done = T.bind(first * i64(frame.shape[2]))
    for segment in range(spec.segments):
        size = T.bind(frame.shape[3 + segment])
        source = T.bind(i64(row) * i64(size))
        _accumulate(frame, frame.buffers[f"X{segment}"], sums, (done, source, size), lanes, nonzero)
        done = T.bind(done + i64(size) * width)
    values = [
        [_finish([chain[each][v] for chain in sums], spec, lanes) for v in range(spec.vectors)] for each in range(rows)
    ]
    _write(frame, values, first, T.bind(i64(row) * i64(frame.shape[1]) + first), lanes)


def _accumulate(
    frame: Frame, x: Any, sums: Any, places: tuple[Any, Any, Any], lanes: int, nonzero: _Nonzero | None
) -> None:
    """Add the products of one segment, or of its listed K: `places` is (its weights, its first X, its K)."""
    weights, source, size = places
    chains, rows, vectors = len(sums), len(sums[0]), len(sums[0][0])
    width = vectors * lanes

    def step(k: Any, chain: int) -> None:
        row = T.bind(weights + k * width)
        columns = [T.bind(load(frame.W, row + vector * lanes, lanes)) for vector in range(vectors)]
        for each in range(rows):
            value = T.bind(splat(x[source + i64(size) * each + k], lanes))
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
    return T.bind(tx.max(value, splat(0.0, lanes)) if spec.relu else value)


def _write(frame: Frame, values: list[list[Any]], first: Any, target: Any, lanes: int) -> None:
    """Store rows of a block from `target`; of the last block, through a buffer, the outputs that exist."""
    outputs, width = i64(frame.shape[1]), len(values[0]) * lanes
    with T.If(first + width <= outputs):
        with T.Then():
            for each, row in enumerate(values):
                for vector, value in enumerate(row):
                    store(frame.Y, target + outputs * each + vector * lanes, value, lanes)
        with T.Else():
            edges = [T.alloc_buffer((width,), "float32", scope="global") for _ in values]
            for each, row in enumerate(values):
                for vector, value in enumerate(row):
                    store(edges[each], vector * lanes, value, lanes)
            with T.serial(0, tx.Cast("int32", outputs - first)) as column:
                for each, edge in enumerate(edges):
                    value = edge[tx.bitwise_and(column, width - 1)]  # mask: no call of memcpy
                    store(frame.Y, target + outputs * each + i64(column), value, 1)
