"""Gated direct convolution: output channels `rows` at pixels `runs`, summed over input channels `cols`.

    Y[o, p] = act(B[o] + sum over c in cols, t in taps of X[c, p + t] * W[o, c, t] (+ R[o, p]))

for o in `rows` and p in `runs`; nothing else of Y is written. Vector lanes run over pixels, so that one output
channel is one row of weights and one contiguous plane: any set of channels is a list, and costs what it holds.

A kernel belongs to a *family* (`DirectConv`), not to a layer: sizes come from the int32 constant `shape`
(`direct_shape`), decisions from the lists. The pixels are cut into panels of a few vectors, the rows into
groups. Both are balanced: 7 rows with a block of 4 are 4 + 3, never 4 + 2 + 1. Every group size has a register-blocked
product of its own. A *packed* kernel first copies a panel's windows of the active input channels to
`scratch`, where all groups read them as aligned vectors; an unpacked one loads its vectors from the planes. With a
stride of 2, the even and the odd columns of a window's rows are all that is copied: every tap is a vector of the one or
the other, some columns on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.abi import Frame, Kernel, i64, prefetch_ahead, write_kernel
from dvexport.targets.tvm.kernels.blocks import Groups, balanced
from dvexport.targets.tvm.kernels.bounds import LIST_HEAD
from dvexport.targets.tvm.kernels.conv.direct_ahead import ask_for_tile, ask_for_weights
from dvexport.targets.tvm.kernels.conv.direct_bounds import state_direct
from dvexport.targets.tvm.kernels.conv.direct_data import HALVES, Shape
from dvexport.targets.tvm.kernels.conv.direct_spec import BEYOND, COLUMNS, DirectConv, spec_for
from dvexport.targets.tvm.kernels.plane import MOST_STEP
from dvexport.targets.tvm.kernels.vectors import (
    ceil_div,
    choose,
    constant,
    cut,
    int32,
    join,
    keep_inside,
    load,
    register,
    store,
)
from dvexport.targets.tvm.machine.dtype import S32, require_dtype
from dvexport.targets.tvm.machine.machine import Machine
from dvexport.targets.tvm.machine.parameters import TALL

__all__ = ["DirectConv", "direct_conv", "spec_for"]


@functools.lru_cache(maxsize=256)  # a network asks for few, and for each many times
def direct_conv(spec: DirectConv, machine: Machine) -> Kernel:
    """Return the function of a family.

    Buffers, in order: X planes, W (`direct_weights`), B `[cout]`, R planes laid out as Y's (with `residual`),
    inside (with `inside`), rows, cols and runs (lists), scratch (`scratch_floats`), shape (`direct_shape`), Y planes.
    Y is none of the others: a run may be computed twice.

    Raises:
        ValueError: the parts of `spec` don't go together.
        UsageError: it computes in an element type that there is no code for.
    """
    _check(spec, machine)
    dtype = spec.dtype
    buffers = dict.fromkeys(["X", "W", "B", *["R"] * spec.residual, *["inside"] * spec.inside], dtype)
    buffers |= {"rows": S32, "cols": S32, "runs": S32, "scratch": dtype, "shape": S32, "Y": dtype}
    with write_kernel(spec.name(machine.lanes), **buffers) as frame:
        _Writer(spec, machine, frame).write()
        state_direct(frame, spec, machine)
    return frame.kernel


def _check(spec: DirectConv, machine: Machine) -> None:
    require_dtype("direct convolution", spec.dtype)
    if machine.lanes % spec.run or spec.step < 1 or spec.taps not in ((0, 1) if spec.packed else (1, 9)):
        raise ValueError(f"no direct convolution has {spec} with {machine.lanes} lanes")
    if spec.inside and spec.run != machine.lanes:
        raise ValueError("runs shorter than a vector cover no padding")
    if spec.columns and (
        spec.columns not in COLUMNS or not spec.packed or spec.taps or spec.step != 2 or spec.run != machine.lanes
    ):
        raise ValueError(f"even and odd columns are packed for whole vectors of stride 2, not for {spec}")
    if not spec.packed and (spec.step != 1 or spec.run == 1):
        raise ValueError("only runs of neighbouring pixels are read from the planes")


@dataclass(frozen=True)
class _Block:
    """A register block: `first` of the list of rows, their numbers, where their weights begin; vectors of pixels."""

    first: Any
    rows: list[Any]
    weights: list[Any]
    vector: Any
    size: int


class _Writer:
    """Writes the body of one kernel."""

    def __init__(self, spec: DirectConv, machine: Machine, frame: Frame) -> None:
        self.spec, self.frame, self.lanes = spec, frame, machine.lanes
        self.by_vector = machine.is_aarch64
        self.rows_block, self.vectors_block = max(spec.block[0], spec.tall), spec.block[1]
        self.pieces = machine.lanes // spec.run
        self.panel_row = self.vectors_block * machine.lanes

    def write(self) -> None:
        frame, spec = self.frame, self.spec
        self.n_cols = T.bind(frame.cols[i64(0)])
        self.depth = 1 if spec.taps == 1 else T.bind(self._shape(Shape.TAPS))
        self.x_plane, self.y_plane = (T.bind(i64(self._shape(entry))) for entry in (Shape.X_PLANE, Shape.Y_PLANE))
        self.w_row = T.bind(i64(self._shape(Shape.W_ROW)))
        self.tile = T.bind(i64(frame.part) * i64(self._shape(Shape.SCRATCH)))
        self.panels = T.bind(self.tile + self.rows_block * self.panel_row)
        self.out_runs, self.in_runs = i64(LIST_HEAD), T.bind(i64(frame.runs[i64(1)]) + LIST_HEAD)
        rows, vectors = self._shares()
        self.last_vector = T.bind(vectors.first + vectors.count * vectors.size + vectors.longer - 1)
        self.lines = T.bind(tx.truncdiv(self.depth, int32(spec.columns))) if spec.columns else self.depth
        self.line = HALVES * self.panel_row if spec.columns else self.panel_row
        self.panel = T.bind(i64(self.n_cols) * i64(self.lines if spec.packed else 1) * self.line)
        blocks = self._blocks(vectors.count)
        with T.serial(0, blocks) as block:
            start = T.bind(tx.truncdiv(vectors.count * block, blocks))
            stop = T.bind(tx.truncdiv(vectors.count * (block + 1), blocks))
            if spec.packed:
                with T.serial(start, stop) as index:
                    self._pack(vectors.group(index)[0], T.bind(self.panels + i64(index - start) * self.panel))
            with T.serial(0, rows.count) as group:
                first, count = rows.group(group)
                choose(count, self.rows_block, lambda n: self._panels(first, n, vectors, start, stop))

    def _shares(self) -> tuple[Groups, Groups]:
        """This thread's rows and vectors: either all rows of some vectors, or all vectors of some rows."""
        part, parts = self.frame.part, self.frame.parts
        rows, vectors = T.bind(self.frame.rows[i64(0)]), T.bind(self.frame.runs[i64(0)])
        some_vectors = T.bind(rows * ceil_div(vectors, parts))
        some_rows = T.bind(vectors * ceil_div(rows, parts))
        split_rows = T.bind(some_rows < some_vectors + self._shape(Shape.PREFER_ROWS))

        def of(count: Any, split: Any, block: Any) -> Groups:
            start = T.bind(tx.Select(split, tx.truncdiv(count * part, parts), int32(0)))
            stop = T.bind(tx.Select(split, tx.truncdiv(count * (part + 1), parts), count))
            return balanced(start, stop, block)

        of_vectors = of(vectors, tx.Not(split_rows), self.vectors_block)
        most: Any = self.spec.block[0]
        if self.spec.tall:
            few = of_vectors.size + tx.min(of_vectors.longer, int32(1)) <= TALL
            held = register(S32, 1)  # a plain binding the simplifier would look through
            T.buffer_store(held, tx.Select(few, int32(self.spec.tall), int32(most)), [0])
            most = T.bind(held[0])
        return of(rows, split_rows, most), of_vectors

    def _blocks(self, panels: Any) -> Any:
        """How many blocks of panels: those of one block stay in the cache while all groups of rows pass over them."""
        size = tx.max(tx.Cast(S32.tvm, self.panel), int32(1))
        together = tx.max(tx.truncdiv(self._shape(Shape.TOGETHER), size), int32(1))
        return T.bind(ceil_div(panels, together))

    def _pack(self, first: Any, panel: Any) -> None:
        """Copy the windows of a panel's vectors to scratch, active input channels only: `[channel][tap][vector]`."""
        vectors = [T.bind(tx.min(first + j, self.last_vector)) for j in range(self.vectors_block)]
        offsets = [self._run(self.in_runs, vector, piece) for vector in vectors for piece in range(self.pieces)]
        with T.serial(0, self.n_cols) as col:
            plane = T.bind(i64(self.frame.cols[i64(col) + 1]) * self.x_plane)
            with T.serial(0, self.lines) as line:
                tap = i64(line) * (self.spec.columns or 1)
                source = T.bind(plane + i64(self.frame.shape[tap + Shape.FIRST_TAP]))
                to = T.bind(panel + (i64(col) * i64(self.lines) + i64(line)) * self.line)
                for index, offset in enumerate(offsets):
                    if self.spec.columns:
                        self._pack_halves(T.bind(source + offset), T.bind(to + index * (HALVES * self.lanes)))
                    else:
                        target = to + index * self.spec.run
                        store(self.frame.scratch, target, self._window(source + offset), self.spec.run)

    def _pack_halves(self, source: Any, target: Any) -> None:
        """Copy the even columns that a vector's windows have in a row, then the odd ones, with room for two vectors."""
        lanes, X = self.lanes, self.frame.X
        first, last = T.bind(load(X, source, 2 * lanes)), T.bind(load(X, source + 2 * lanes, BEYOND))
        for parity in range(2):
            at = target + parity * (HALVES // 2 * lanes)
            store(self.frame.scratch, at, tx.Shuffle([first], list(range(parity, 2 * lanes, 2))), lanes)
            beyond = tx.Shuffle([last], list(range(parity, BEYOND, 2)))
            store(self.frame.scratch, at + lanes, beyond, BEYOND // 2)

    def _window(self, offset: Any) -> Any:
        """A run's pixels under one tap."""
        run, X = self.spec.run, self.frame.X
        if self.spec.step == 1 or run == 1:
            return load(X, offset, run)
        if self.spec.step > MOST_STEP:
            return X[tx.Ramp(offset, self.spec.step, run)]
        return tx.Shuffle([load(X, offset, run), load(X, offset + run, run)], list(range(0, 2 * run, 2)))

    def _panels(self, first: Any, count: int, vectors: Groups, start: Any, stop: Any) -> None:
        """The products of a group of rows with all panels of a block."""
        rows = [T.bind(i64(self.frame.rows[i64(first + i) + 1])) for i in range(count)]
        weights = [T.bind(row * self.w_row) for row in rows]
        with T.serial(start, stop) as index:
            vector, size = vectors.group(index)
            panel = T.bind(self.panels + i64(index - start) * self.panel)
            widest = self.vectors_block if len(rows) <= self.spec.block[0] else TALL
            choose(size, widest, lambda n: self._product(_Block(first, rows, weights, vector, n), panel))
            self._epilogue(first, count, vector, size)

    def _product(self, block: _Block, panel: Any) -> None:
        """One register block; its sums go to the tile in scratch."""
        lanes, vectors = [tx.Ramp(0, 1, self.lanes)], range(block.size)
        sums = [[register(self.spec.dtype, self.lanes) for _ in vectors] for _ in block.rows]
        for row, line in zip(block.rows, sums, strict=True):
            bias = T.bind(tx.Broadcast(self.frame.B[row], self.lanes))
            for total in line:
                T.buffer_store(total, bias, lanes)

        def add(pixels: Sequence[Any], weight: Callable[[int], Any]) -> None:
            for i, line in enumerate(sums):
                factor = T.bind(weight(i))
                for total, pixel in zip(line, pixels, strict=True):
                    T.buffer_store(total, total[lanes[0]] + factor * pixel, lanes)

        if self.spec.packed:
            self._sum_packed(block, panel, add)
        else:
            self._sum_planes(block, add)
        for i, line in enumerate(sums):
            for j, total in enumerate(line):
                store(self.frame.scratch, self.tile + i * self.panel_row + j * self.lanes, total[lanes[0]], self.lanes)

    def _sum_packed(self, block: _Block, panel: Any, add: Callable[..., None]) -> None:
        if self.spec.taps == 1:
            self._sum_points(block, panel, add)
            return
        depth = i64(self.depth)
        with T.serial(0, self.n_cols) as col:
            weight = T.bind(i64(self.frame.cols[i64(col) + 1]) * depth)
            if self.spec.ahead:
                for row in block.weights:
                    prefetch_ahead(self.frame.W, row + weight)
            if self.spec.columns:
                with T.serial(0, self.lines) as line:
                    pixel = T.bind(panel + (i64(col) * i64(self.lines) + i64(line)) * self.line)
                    self._some_columns(block, weight + i64(line) * self.spec.columns, pixel, add)
                return
            pixel = T.bind(panel + i64(col) * depth * self.panel_row)
            done = int32(0)
            if self.by_vector:
                fours = T.bind(tx.truncdiv(self.depth, int32(4)))
                with T.serial(0, fours) as four:
                    self._some_taps(block, weight + i64(four) * 4, pixel + i64(four) * (4 * self.panel_row), 4, add)
                done = T.bind(fours * 4)
            with T.serial(done, self.depth) as tap:
                self._some_taps(block, weight + i64(tap), pixel + i64(tap) * self.panel_row, 1, add)

    def _sum_points(self, block: _Block, panel: Any, add: Callable[..., None]) -> None:
        """A 1 x 1 window: as many input channels at a time as weights share a cache line, each time asking for some."""
        line = self.spec.dtype.line
        with T.serial(0, T.bind(ceil_div(self.n_cols, line))) as turn:
            first = T.bind(turn * line)
            if self.spec.ahead:
                frame = self.frame
                ask_for_weights(frame, block.first, len(block.rows), self.w_row, first)
                row = T.bind(block.first + tx.truncmod(turn, int32(len(block.rows))))
                offsets = [self._run(self.out_runs, block.vector + j, 0) for j in range(block.size)]
                ask_for_tile(frame, row, offsets, self.y_plane, residual=self.spec.residual)
            with T.serial(first, T.bind(tx.min(first + line, self.n_cols))) as col:
                weight = T.bind(i64(self.frame.cols[i64(col) + 1]))
                self._some_taps(block, weight, panel + i64(col) * self.panel_row, 1, add)

    def _some_taps(self, block: _Block, weight: Any, panel: Any, taps: int, add: Callable[..., None]) -> None:
        weight, panel = T.bind(weight), T.bind(panel)
        factor = self._factors(block.weights, weight, taps)
        for tap in range(taps):
            first = panel + tap * self.panel_row
            pixels = [T.bind(load(self.frame.scratch, first + j * self.lanes, self.lanes)) for j in range(block.size)]
            add(pixels, lambda i, tap=tap: factor(i, tap))

    def _some_columns(self, block: _Block, weight: Any, line: Any, add: Callable[..., None]) -> None:
        """A row of the window, its even and odd columns packed."""
        lanes = self.lanes
        factor = self._factors(block.weights, T.bind(weight), self.spec.columns)
        for column in range(self.spec.columns):
            at = line + (column % 2 * (HALVES // 2 * lanes) + column // 2)
            pixels = [T.bind(load(self.frame.scratch, at + j * (HALVES * lanes), lanes)) for j in range(block.size)]
            add(pixels, lambda i, column=column: factor(i, column))

    def _sum_planes(self, block: _Block, add: Callable[..., None]) -> None:
        pieces = range(self.pieces)
        vectors = [T.bind(block.vector + j) for j in range(block.size)]
        offsets = [[self._run(self.in_runs, vector, piece) for piece in pieces] for vector in vectors]

        def line(plane: Any, weight: Any, columns: int) -> None:
            factor = self._factors(block.weights, weight, columns)
            for column in range(columns):
                pixels = []
                for pieces in offsets:
                    parts = [load(self.frame.X, plane + piece + column, self.spec.run) for piece in pieces]
                    pixels.append(T.bind(join(parts, self.spec.run)))
                add(pixels, lambda i, column=column: factor(i, column))

        with T.serial(0, self.n_cols) as col:
            channel = T.bind(i64(self.frame.cols[i64(col) + 1]))
            plane = T.bind(channel * self.x_plane)
            if self.spec.taps == 1:
                line(plane, channel, 1)
                return
            with T.serial(0, 3) as y:
                above = T.bind(plane + i64(self.frame.shape[i64(y) * 3 + Shape.FIRST_TAP]))
                line(above, T.bind(channel * 9 + i64(y) * 3), 3)

    def _factors(self, weights: list[Any], first: Any, taps: int) -> Callable[[int, int], Any]:
        """How to get weight (row, tap) as a vector of equal lanes.

        AArch64 multiplies by one lane of a register, so four weights are loaded together, even where one is wanted:
        to broadcast from memory would take time from the multipliers.
        """
        if not self.by_vector:
            return lambda row, tap: tx.Broadcast(self.frame.W[weights[row] + first + tap], self.lanes)
        loaded: dict[tuple[int, int], Any] = {}

        def factor(row: int, tap: int) -> Any:
            four = row, tap // 4 * 4
            if four not in loaded:
                loaded[four] = T.bind(load(self.frame.W, weights[row] + first + four[1], 4))
            return tx.Shuffle([loaded[four]], [tap % 4] * self.lanes)

        return factor

    def _epilogue(self, first: Any, count: int, vector: Any, size: Any) -> None:
        """Finish the sums of a tile, and write them to their runs."""
        with T.serial(0, count) as i:
            plane = T.bind(i64(self.frame.rows[i64(first + i) + 1]) * self.y_plane)
            with T.serial(0, size) as j:
                value = load(self.frame.scratch, self.tile + i64(i) * self.panel_row + i64(j) * self.lanes, self.lanes)
                offsets = [self._run(self.out_runs, vector + j, piece) for piece in range(self.pieces)]
                value = T.bind(self._finish(value, plane, offsets))
                for piece, offset in enumerate(offsets):
                    store(self.frame.Y, plane + offset, cut(value, piece, self.spec.run, self.lanes), self.spec.run)

    def _finish(self, value: Any, plane: Any, offsets: list[Any]) -> Any:
        if self.spec.residual:
            value = value + join(
                [load(self.frame.R, plane + offset, self.spec.run) for offset in offsets], self.spec.run
            )
        if self.spec.relu:
            value = tx.max(value, constant(0.0, self.spec.dtype, self.lanes))
        if self.spec.inside:
            value = keep_inside(value, load(self.frame.inside, offsets[0], self.lanes), self.spec.dtype, self.lanes)
        return value

    def _run(self, table: Any, vector: Any, piece: int) -> Any:
        return T.bind(i64(self.frame.runs[table + i64(vector) * self.pieces + piece]))

    def _shape(self, entry: int) -> Any:
        return self.frame.shape[i64(int(entry))]
