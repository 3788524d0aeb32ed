"""Attention: softmax(scale * Q K^T (+ biases)) V of every head, a block of queries at a time.

Q, K and V are read where they lie, by strides, so that neither splitting heads nor transposing moves anything. For
each head keys and values are packed into panels once. For each block of queries all scores are computed into scratch,
where softmax turns them into weights; the weights are multiplied with the values. All of these stay in a core's second
level cache. Threads share (head, block of queries) pairs.

Without softmax the same loops are a product of two activations, A B^T (`Attention.softmax`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.abi import Frame, Kernel, i64, share, write_kernel
from dvexport.targets.tvm.kernels.blocks import Rows, balanced, product, register_block
from dvexport.targets.tvm.kernels.bounds import Needs, Size, at_least, entry, least
from dvexport.targets.tvm.kernels.tokens.activations import LOG2_E, NUMBERS, Numbers, exp2_numbers
from dvexport.targets.tvm.kernels.tokens.attention_bounds import state_attention
from dvexport.targets.tvm.kernels.tokens.panels import Keys, Values, pack_keys, pack_values
from dvexport.targets.tvm.kernels.vectors import ceil_div, choose, constant, int32, load, register, splat, store
from dvexport.targets.tvm.machine.dtype import F32, S32, DType, require_dtype
from dvexport.targets.tvm.machine.machine import Machine

__all__ = [
    "Attention",
    "Bias",
    "Sizes",
    "Strides",
    "attention",
    "attention_scratch",
    "attention_shape",
    "attention_spec",
]

_QUERIES = 32
"""Queries of a block."""

_VALUES = 256
"""Values that a block of queries passes over together: some 32 KB of a panel, by lanes."""

_APART = 2048
"""Bytes: rows of scores that are a multiple of it apart share few cache sets."""

_NEVER = -3e38
"""A score that weighs nothing."""


class _Shape(IntEnum):
    BATCHES = 0
    HEADS = 1
    QUERIES = 2
    KEYS = 3
    DEPTH = 4
    WIDTH = 5
    SLICE = 6
    NUMBERS = 7
    PITCH = 8
    Q = 9
    K = 14
    V = 19
    Y = 24
    BIAS = 29


@dataclass(frozen=True)
class Strides:
    """Where a tensor `[batches, heads, rows, columns]` lies in its buffer, in floats."""

    offset: int
    batch: int
    head: int
    row: int
    column: int = 1


@dataclass(frozen=True)
class Bias:
    """Where a bias `[batches, heads, queries, keys]` lies; that of batch b is number b mod `period`, rows are dense."""

    period: int
    batch: int
    head: int


@dataclass(frozen=True)
class Sizes:
    """The sizes of one attention: `depth` is that of queries and keys, `width` that of values."""

    batches: int
    heads: int
    queries: int
    keys: int
    depth: int
    width: int


@dataclass(frozen=True)
class Attention:
    """A family.

    Attributes:
        vectors: how many vectors of values a panel has.
        biases: how many are added to the scaled scores: 0, 1 or 2.
        softmax: False: Y is the scaled scores themselves, and there is no V.
        dtype: the type of all tensors and sums.
    """

    vectors: int
    biases: int = 0
    softmax: bool = True
    dtype: DType = F32

    @property
    def name(self) -> str:
        """The kernel's symbol, block left out."""
        return f"{self.dtype}_{self.family}"

    @property
    def family(self) -> str:
        """What names of kernels of all element types have in common."""
        return f"attention_v{self.vectors}_b{self.biases}" if self.softmax else "scores"


def attention_spec(width: int, biases: int, machine: Machine) -> Attention:
    """Return the family for values of `width` floats: as few panels as registers allow, of equal size."""
    vectors = -(-width // machine.lanes)
    panels = -(-vectors // register_block(machine)[1])
    return Attention(-(-vectors // panels), biases)


def attention_shape(
    sizes: Sizes, strides: tuple[Strides, ...], biases: tuple[Bias, ...], spec: Attention, machine: Machine
) -> np.ndarray:
    """Return the int32 constant `shape`; `strides` are of Q, K, V and Y; without softmax of A, B and Y."""
    made = np.zeros(_Shape.BIAS + 3 * len(biases), np.int32)
    values = (sizes.batches, sizes.heads, sizes.queries, sizes.keys, sizes.depth, sizes.width)
    made[: len(values)] = values
    made[_Shape.SLICE] = _slice(sizes, spec, machine)
    made[_Shape.NUMBERS] = NUMBERS
    made[_Shape.PITCH] = _pitch(sizes, spec, machine)
    places = (_Shape.Q, _Shape.K, _Shape.V, _Shape.Y) if spec.softmax else (_Shape.Q, _Shape.K, _Shape.Y)
    for place, each in zip(places, strides, strict=True):
        made[place : place + 5] = each.offset, each.batch, each.head, each.row, each.column
    for index, bias in enumerate(biases):
        made[_Shape.BIAS + 3 * index :][:3] = bias.period, bias.batch, bias.head
    return made


def attention_scratch(threads: int, sizes: Sizes, spec: Attention, machine: Machine) -> int:
    """Return the floats of `scratch` for so many parts."""
    return threads * _slice(sizes, spec, machine)


def _pitch(sizes: Sizes, spec: Attention, machine: Machine) -> int:
    """Elements of a row of scores: whole panels, and no multiple of `_APART`."""
    panel = register_block(machine)[1] * machine.lanes
    pitch = -(-sizes.keys // panel) * panel
    return pitch + spec.dtype.line if spec.dtype.size(pitch) % _APART == 0 else pitch


def _tiles(spec: Attention, machine: Machine) -> int:
    """Floats of the tiles of sums: one group of queries for scores, all groups of a block for the outputs."""
    rows, vectors = register_block(machine)
    groups = -(-_QUERIES // rows)
    return rows * max(vectors, groups * spec.vectors) * machine.lanes


def _slice(sizes: Sizes, spec: Attention, machine: Machine) -> int:
    """Floats of a thread: numbers twice, factors of rows, tiles, scores, keys and values."""
    panel = register_block(machine)[1] * machine.lanes
    keys = -(-sizes.keys // panel) * panel * sizes.depth
    line = spec.dtype.line
    fixed = 2 * NUMBERS + _QUERIES + _tiles(spec, machine)
    if not spec.softmax:
        return -(-(fixed + keys) // line) * line
    width = spec.vectors * machine.lanes
    values = -(-sizes.width // width) * width * sizes.keys
    return -(-(fixed + _QUERIES * _pitch(sizes, spec, machine) + keys + values) // line) * line


def attention(spec: Attention, machine: Machine) -> Kernel:
    """Y of Q, K, V, biases. Buffers: Q, K, (V,) (bias0, bias1,) scale `[1]`, scratch, shape, Y.

    Raises:
        UsageError: it computes in an element type that there is no code for.
    """
    require_dtype("attention", spec.dtype)
    names = ["Q", "K", *(["V"] if spec.softmax else []), *(f"bias{i}" for i in range(spec.biases)), "scale", "scratch"]
    name = f"{spec.name}_{'x'.join(map(str, register_block(machine)))}"
    with write_kernel(name, **dict.fromkeys(names, spec.dtype), shape=S32, Y=spec.dtype) as frame:
        _Writer(spec, machine, frame).write()
        biases, periods = _biases_read(spec)
        state(frame, spec, machine, biases, int(_Shape.BIAS) + 3 * spec.biases, at_least(1, *periods))
    return frame.kernel


def _biases_read(spec: Attention) -> tuple[dict[str, Size], list[Size]]:
    """Return the floats of each bias that are read, and its period."""
    batches, heads, queries, keys = map(entry, range(4))
    made, periods = dict[str, Size](), list[Size]()
    for index in range(spec.biases):
        period, batch, head = (entry(_Shape.BIAS + 3 * index + i) for i in range(3))
        made[f"bias{index}"] = (least(batches, period) - 1) * batch + (heads - 1) * head + queries * keys
        periods.append(period)
    return made, periods


def state(
    frame: Frame, spec: Attention, machine: Machine, biases: dict[str, Size], shape: Size | int, needs: Needs = ()
) -> None:
    """State what attention touches; `biases`: floats of each; `shape`: its entries; `needs`: what the biases need."""
    names = ("batches", "heads", "queries", "keys", "depth", "width", "slice", "numbers", "pitch")
    places = {name: index for index, name in enumerate(names)} | {"Q": int(_Shape.Q), "K": int(_Shape.K)}
    places |= {"Y": int(_Shape.Y)} | ({"V": int(_Shape.V)} if spec.softmax else {})
    panels = {
        "keys": register_block(machine)[1] * machine.lanes, "width": spec.vectors * machine.lanes * spec.softmax,
        "tiles": _tiles(spec, machine), "queries": _QUERIES,
    }  # fmt: skip
    state_attention(frame, places, biases, panels, shape, needs)


class _Writer:
    def __init__(self, spec: Attention, machine: Machine, frame: Frame) -> None:
        self.spec, self.machine, self.frame, self.lanes = spec, machine, frame, machine.lanes
        self.most, self.vectors = register_block(machine)
        self.panel, self.width = self.vectors * self.lanes, spec.vectors * self.lanes

    def write(self) -> None:
        self._places()
        queries = self._shape(_Shape.QUERIES)
        blocks = T.bind(ceil_div(queries, _QUERIES))
        heads = T.bind(self._shape(_Shape.HEADS))
        low, high = share(self._shape(_Shape.BATCHES) * heads * blocks, self.frame.part, self.frame.parts)
        with T.serial(tx.truncdiv(low, blocks), tx.truncdiv(high + (blocks - 1), blocks)) as item:
            self.batch, self.head = T.bind(tx.truncdiv(item, heads)), T.bind(tx.truncmod(item, heads))
            start = T.bind(tx.max(low - item * blocks, int32(0)))
            stop = T.bind(tx.min(high - item * blocks, blocks))
            self._pack()
            with T.serial(start, stop) as block:
                first = T.bind(block * _QUERIES)
                rows = balanced(first, T.bind(tx.min(first + _QUERIES, queries)), self.most)
                self._scores(rows)
                if self.spec.softmax:
                    with T.serial(first, T.bind(tx.min(first + _QUERIES, queries))) as row:
                        self._softmax(first, row)
                    self._output(first, rows)

    def _places(self) -> None:
        """Lay out this thread's scratch."""
        frame = self.frame
        self.keys, self.depth = T.bind(self._shape(_Shape.KEYS)), T.bind(self._shape(_Shape.DEPTH))
        self.values = T.bind(self._shape(_Shape.WIDTH))
        self.pitch = T.bind(i64(self._shape(_Shape.PITCH)))
        base = T.bind(i64(frame.part) * i64(self._shape(_Shape.SLICE)))
        self.numbers = Numbers(frame.scratch, T.bind(base + i64(self._shape(_Shape.NUMBERS))))
        self.numbers.write([*exp2_numbers(), 1.0, LOG2_E, _NEVER])
        self.factors = T.bind(base + 2 * NUMBERS)
        self.tile = T.bind(self.factors + _QUERIES)
        self.scores = T.bind(self.tile + _tiles(self.spec, self.machine))
        self.packed = T.bind(self.scores + self.pitch * _QUERIES) if self.spec.softmax else self.scores
        self.panels = T.bind(ceil_div(self.keys, self.panel))
        self.packed_values = T.bind(self.packed + i64(self.panels) * self.panel * i64(self.depth))
        self.scale = T.bind(frame.scale[0])

    def _pack(self) -> None:
        """Copy this head's keys and values to panels."""
        frame, start = self.frame, self._start(_Shape.K)
        row, column = (T.bind(i64(self._shape(_Shape.K + i))) for i in (3, 4))
        keys = Keys(frame.K, start, row, column, self.keys, self.depth)
        pack_keys(keys, frame.scratch, self.packed, self.panels, (self.vectors, self.lanes))
        if self.spec.softmax:
            start, row = self._start(_Shape.V), T.bind(i64(self._shape(_Shape.V + 3)))
            values = Values(frame.V, start, row, self.keys, self.values)
            pack_values(values, frame.scratch, self.packed_values, (self.spec.vectors, self.lanes))

    def _scores(self, rows: Any) -> None:
        """Compute queries x keys, panel by panel: into scratch, or into Y."""
        frame, lanes = self.frame, self.lanes
        source, stride = self._start(_Shape.Q), T.bind(i64(self._shape(_Shape.Q + 3)))
        with T.serial(0, self.panels) as panel:
            weights = T.bind(self.packed + i64(panel) * self.panel * i64(self.depth))
            with T.serial(0, rows.count) as group:
                row, size = rows.group(group)
                if self.spec.softmax:
                    at = T.bind(self.scores + i64(row - rows.first) * self.pitch + i64(panel) * self.panel)
                    tile = frame.scratch, at, self.pitch
                else:
                    tile = frame.scratch, self.tile, self.panel
                begin = T.bind(source + i64(row) * stride)

                def block(n: int, begin: Any = begin, tile: Any = tile) -> None:
                    panel_of = frame.scratch, weights, self.panel
                    product(
                        Rows(frame.Q, begin, stride), n, panel_of, self.depth, tile, (self.vectors, lanes), self.machine
                    )

                choose(size, self.most, block)
                if not self.spec.softmax:
                    edge = self.panel, T.bind(panel * self.panel), self.keys
                    self._write(row, size, edge, lambda each: self.scale, self.tile)

    def _softmax(self, first: Any, row: Any) -> None:
        """Turn a row of scores into weights that are not normalised yet, and keep one over their sum."""
        frame, lanes = self.frame, self.lanes
        line = T.bind(self.scores + i64(row - first) * self.pitch)
        whole = T.bind(tx.truncdiv(self.keys, lanes))
        vectors = T.bind(ceil_div(self.keys, lanes))
        scale = T.bind(self._biased(row, line, whole) * self.numbers(LOG2_E, 1))
        with T.serial(self.keys, vectors * lanes) as each:
            store(frame.scratch, line + i64(each), self.numbers(_NEVER, 1), 1)
        largest, total = (register(self.spec.dtype, lanes) for _ in range(2))
        chains = [register(self.spec.dtype, lanes) for _ in range(3)]
        for each in (largest, *chains):
            store(each, 0, splat(self.numbers(_NEVER, 1), lanes), lanes)
        turns = T.bind(tx.truncdiv(vectors, 4))
        with T.serial(0, turns) as turn:
            for index, each in enumerate((largest, *chains)):
                value = load(frame.scratch, line + (i64(turn) * 4 + index) * lanes, lanes)
                store(each, 0, tx.max(load(each, 0, lanes), value), lanes)
        with T.serial(turns * 4, vectors) as vector:
            value = load(frame.scratch, line + i64(vector) * lanes, lanes)
            store(largest, 0, tx.max(load(largest, 0, lanes), value), lanes)
        for each in chains:
            store(largest, 0, tx.max(load(largest, 0, lanes), load(each, 0, lanes)), lanes)
        peak = splat(T.bind(self._across(largest, tx.max)), lanes)
        store(total, 0, constant(0.0, self.spec.dtype, lanes), lanes)
        with T.serial(0, vectors) as vector:
            at = T.bind(line + i64(vector) * lanes)
            less = T.bind((load(frame.scratch, at, lanes) - peak) * splat(scale, lanes))
            value = T.bind(self.numbers.exp2(less, lanes))
            store(frame.scratch, at, value, lanes)
            store(total, 0, load(total, 0, lanes) + value, lanes)
        one = self.numbers(1.0, 1)
        store(frame.scratch, self.factors + i64(row - first), one / self._across(total, lambda a, b: a + b), 1)

    def _biased(self, row: Any, line: Any, whole: Any) -> Any:
        """Scale a row and add its biases; without biases the scale is left to the exponential."""
        frame, lanes = self.frame, self.lanes
        if not self.spec.biases:
            return self.scale
        starts = self._bias_starts(row)

        def add(at: Any, width: int) -> None:
            value = load(frame.scratch, line + at, width) * splat(self.scale, width)
            for index, start in enumerate(starts):
                value = value + load(frame.buffers[f"bias{index}"], start + at, width)
            store(frame.scratch, line + at, value, width)

        with T.serial(0, whole) as vector:
            add(T.bind(i64(vector) * lanes), lanes)
        with T.serial(whole * lanes, self.keys) as each:
            add(T.bind(i64(each)), 1)
        return self.numbers(1.0, 1)

    def _bias_starts(self, row: Any) -> list[Any]:
        """Return where the biases of a row begin, in their buffers."""
        starts = []
        for index in range(self.spec.biases):
            period, batch, head = (T.bind(self._shape(_Shape.BIAS + 3 * index + i)) for i in range(3))
            start = i64(tx.truncmod(self.batch, period)) * i64(batch) + i64(self.head) * i64(head)
            starts.append(T.bind(start + i64(row) * i64(self.keys)))
        return starts

    def _across(self, cell: Any, operator: Any) -> Any:
        """Combine the lanes of a vector."""
        half = self.lanes // 2
        while half:
            store(cell, 0, operator(load(cell, 0, half), load(cell, half, half)), half)
            half //= 2
        return cell[0]

    def _output(self, first: Any, rows: Any) -> None:
        """Multiply weights with values, normalise and store; values that stay in the first level cache at a time."""
        frame, lanes, size = self.frame, self.lanes, self.most * self.width
        pieces = T.bind(tx.max(tx.truncdiv(self.keys + _VALUES // 2, _VALUES), int32(1)))
        with T.serial(0, ceil_div(self.values, self.width)) as panel:
            values = T.bind(self.packed_values + i64(panel) * self.width * i64(self.keys))
            with T.serial(0, tx.truncdiv(rows.count * size, lanes)) as vector:
                store(frame.scratch, self.tile + i64(vector) * lanes, constant(0.0, self.spec.dtype, lanes), lanes)
            with T.serial(0, pieces) as piece:
                low = T.bind(tx.truncdiv(self.keys * piece, pieces))
                depth = T.bind(tx.truncdiv(self.keys * (piece + 1), pieces) - low)
                part = frame.scratch, T.bind(values + i64(low) * self.width), self.width
                with T.serial(0, rows.count) as group:
                    row, count = rows.group(group)
                    begin = T.bind(self.scores + i64(row - first) * self.pitch + i64(low))
                    tile = T.bind(self.tile + i64(group) * size)

                    def add(n: int, given: tuple[Any, ...] = (begin, part, depth, tile)) -> None:
                        self._add(n, *given)

                    choose(count, self.most, add)
            with T.serial(0, rows.count) as group:
                row, count = rows.group(group)
                factor, tile = T.bind(self.factors + i64(row - first)), T.bind(self.tile + i64(group) * size)
                edge = self.width, T.bind(panel * self.width), self.values
                self._write(row, count, edge, lambda each, factor=factor: frame.scratch[factor + i64(each)], tile)

    def _add(self, rows: int, begin: Any, values: tuple[Any, Any, Any], depth: Any, tile: Any) -> None:
        """Add a product of weights and values to a tile of sums."""
        scratch, lanes = self.frame.scratch, self.lanes

        def sums(row: int, vector: int) -> Any:
            return load(scratch, tile + (row * self.width + vector * lanes), lanes)

        product(
            Rows(scratch, begin, self.pitch), rows, values, depth, (scratch, tile, self.width),
            (self.spec.vectors, lanes), self.machine, starts=sums,
        )  # fmt: skip

    def _write(self, row: Any, size: Any, edge: tuple[int, Any, Any], factor: Any, tile: Any) -> None:
        """Store a tile times a factor by row; `edge`: floats of a tile's row, its first column, and all columns."""
        frame, lanes, (pitch, column, columns) = self.frame, self.lanes, edge
        start, stride = self._start(_Shape.Y), T.bind(i64(self._shape(_Shape.Y + 3)))
        left = T.bind(tx.min(columns - column, pitch))
        whole = T.bind(tx.truncdiv(left, lanes))
        with T.serial(0, size) as each:
            source = T.bind(tile + i64(each) * pitch)
            target = T.bind(start + i64(row + each) * stride + i64(column))
            by = T.bind(factor(each))
            with T.serial(0, whole) as vector:
                at = T.bind(i64(vector) * lanes)
                store(frame.Y, target + at, load(frame.scratch, source + at, lanes) * splat(by, lanes), lanes)
            with T.serial(whole * lanes, left) as one:
                store(frame.Y, target + i64(one), frame.scratch[source + i64(one)] * by, 1)

    def _start(self, place: int) -> Any:
        """Where this batch's and head's rows of a tensor begin."""
        offset, batch, head = (i64(self._shape(place + i)) for i in range(3))
        return T.bind(offset + i64(self.batch) * batch + i64(self.head) * head)

    def _shape(self, entry: int) -> Any:
        return self.frame.shape[i64(int(entry))]
