"""Gated 3 x 3 convolution with stride 1 and padding 1, by Winograd's F(4 x 4, 3 x 3) or F(2 x 2, 3 x 3).

    Y[o] = relu?(sum over i in cols of X[i] * W[o, i] + B[o] (+ R[o]))    for o in rows, at the pixels of `tiles`

and nothing else is written, so an output channel, an input channel and a tile that is not listed cost nothing.
Lanes are tiles. A block of tile vectors is transformed for all listed inputs and stays in the second level cache.
Then each group of output channels is (m + 2)^2 matrix products of a register block each, and transformed back.

A kernel serves every layer: sizes are in `shape` (see `winograd_lists.Shape`). Output tiles may overshoot the
right and bottom edge of the image into the padding of the plane; what they write there are zeros, chosen by `inside`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.abi import Frame, Kernel, i64, prefetch_ahead, share, write_kernel
from dvexport.targets.tvm.kernels.blocks import Groups
from dvexport.targets.tvm.kernels.bounds import LIST_HEAD
from dvexport.targets.tvm.kernels.conv.winograd_bounds import state_winograd
from dvexport.targets.tvm.kernels.conv.winograd_lists import Shape, tile_cells
from dvexport.targets.tvm.kernels.conv.winograd_vectors import (
    even_odd,
    gather,
    input_transform,
    interleave,
    multiply_add,
    output_transform,
    transpose4,
)
from dvexport.targets.tvm.kernels.plane import Plane, require_two_axes
from dvexport.targets.tvm.kernels.vectors import ceil_div, choose, constant, int32, keep_inside, register
from dvexport.targets.tvm.machine.dtype import F32, S32, S64, DType, require_dtype
from dvexport.targets.tvm.machine.machine import Machine
from dvexport.targets.tvm.machine.parameters import parameters_of

__all__ = ["WinogradConv", "part_floats", "scratch_floats", "spec_for", "winograd_conv"]

_GRAIN = 4
"""Output channels that threads don't share."""


@dataclass(frozen=True)
class WinogradConv:
    """What the code of a kernel depends on, besides the machine.

    Attributes:
        m: edge of an output tile, 2 or 4.
        inside: tiles may overshoot the image.
        residual: R is added before the activation. R and Y must not be the same buffer.
        relu: negative outputs become zero.
        block: output channels of the register block, for a block of one tile vector, of two, and so on. Its length
            is the most vectors of a block.
        ahead: weights are prefetched: for layers whose few vectors read each weight only once.
        dtype: the type of pixels, weights and sums.
    """

    m: int
    inside: bool
    residual: bool
    relu: bool
    block: tuple[int, ...]
    ahead: bool = False
    dtype: DType = F32

    @property
    def points(self) -> int:
        """Matrix products of a tile."""
        return (self.m + 2) ** 2

    @property
    def gap(self) -> int:
        """Elements between the points of transformed input, so that they don't fall into one cache set."""
        return self.dtype.line

    def name(self, machine: Machine) -> str:
        """Return the symbol of the kernel."""
        options = ("ahead", "inside", "residual", "relu")
        epilogue = "".join(f"_{option}" for option in options if getattr(self, option))
        return f"{self.dtype}_winograd{self.m}_{machine.lanes}_{'_'.join(map(str, self.block))}{epilogue}"


def spec_for(
    plane_in: Plane, plane_out: Plane, grid: tuple[int, int] | None, machine: Machine, *, residual: bool, relu: bool
) -> WinogradConv | None:
    """Return the kernel with the least multiplications for a layer, or nothing if tiles don't fit its gate's cells.

    Lanes that have no tile are counted. At 14 x 14, F(4, 3) is one vector of 16 lanes and F(2, 3) four. So the former
    is faster, but only the latter saves anything when half of the tiles are skipped.

    Args:
        plane_in, plane_out: the layout of a channel of X and of Y.
        grid: rows and columns of the gate's cells; None if it does not choose among tiles.
        machine: what to generate code for.
        residual, relu: see `WinogradConv`.

    Raises:
        UsageError: the planes have not two spatial axes.
    """
    require_two_axes("a Winograd convolution", plane_in, plane_out)
    height, width = plane_out.height, plane_out.width

    def vector_products(m: int) -> int:
        tiles = -(-height // m) * -(-width // m)
        expected = tiles if grid is None else -(-tiles // 2)
        return -(-expected // machine.lanes) * (m + 2) ** 2

    fitting = [m for m in (4, 2) if grid is None or tile_cells(plane_in, plane_out, grid, m) is not None]
    if not fitting:
        return None
    m = min(fitting, key=vector_products)
    block = parameters_of(machine).winograd
    ahead = vector_products(m) <= len(block) * (m + 2) ** 2
    return WinogradConv(m, bool(height % m or width % m), residual, relu, block, ahead, plane_in.dtype)


def part_floats(spec: WinogradConv, cin: int, vectors: int, machine: Machine) -> int:
    """Return the scratch that one thread needs, in elements.

    Args:
        spec: the kernel.
        cin: input channels.
        vectors: the most vectors of tiles that a call computes.
        machine: what it runs on.
    """
    lanes, block = machine.lanes, spec.block[: max(vectors, 1)]
    transformed = spec.points * (len(block) * lanes * cin + spec.gap)
    products = spec.points * lanes * max(rows * count for count, rows in enumerate(block, 1))
    total = transformed + products + spec.points * lanes
    return -(-total // spec.dtype.line) * spec.dtype.line


def scratch_floats(spec: WinogradConv, cin: int, vectors: int, threads: int, machine: Machine) -> int:
    """Return the size of the buffer `scratch` in elements; see `part_floats`."""
    return threads * part_floats(spec, cin, vectors, machine)


@functools.lru_cache(maxsize=256)  # a network asks for few, and for each many times
def winograd_conv(spec: WinogradConv, machine: Machine) -> Kernel:
    """Return the kernel; its buffers are X, U, B, [R], [inside], rows, cols, tiles, scratch, shape and Y.

    X, R and Y are planes, `inside` is `Plane.inside()` of the output, B is `[cout]`, U is
    `[cout, row_floats]`, for every point the weights of the input channels (`plan.Derivation`), `rows` and `cols` are
    channel lists, `tiles` is a run list of tiles: see `dense_tiles`.

    Raises:
        UsageError: it computes in an element type that there is no code for.
    """
    require_dtype("Winograd convolution", spec.dtype)
    dtype = spec.dtype
    buffers = dict.fromkeys(["X", "U", "B", *["R"] * spec.residual, *["inside"] * spec.inside], dtype)
    buffers |= {"rows": S32, "cols": S32, "tiles": S32, "scratch": dtype, "shape": S32, "Y": dtype}
    with write_kernel(spec.name(machine), **buffers) as frame:
        _Writer(spec, machine, frame).write()
        how = {"residual": spec.residual, "inside": spec.inside}
        state_winograd(frame, spec.m, spec.block, machine.lanes, spec.gap, **how)
    return frame.kernel


class _Writer:
    """Writes the body of one kernel."""

    def __init__(self, spec: WinogradConv, machine: Machine, frame: Frame) -> None:
        self.spec, self.frame, self.machine = spec, frame, machine
        self.lanes, self.n, self.points, self.dtype = machine.lanes, spec.m + 2, spec.points, spec.dtype
        self.row_count, self.col_count = T.bind(frame.rows[0]), T.bind(frame.cols[0])
        self.vectors = T.bind(frame.tiles[0])
        self.capacity = T.bind(frame.tiles[1])
        self.sizes = {place: T.bind(i64(frame.shape[int(place)])) for place in Shape}
        self.scratch = _hold(i64(frame.part) * self.sizes[Shape.SCRATCH], S64)

    def write(self) -> None:
        """Write everything: blocks of vectors outside, groups of output channels inside."""
        bounds = share(self.vectors * self.row_count, self.frame.part, self.frame.parts)
        start, stop = (_hold(bound) for bound in bounds)
        blocks = _blocks(self.vectors, len(self.spec.block))
        with T.serial(0, blocks) as index:
            first, count = _balanced(self.vectors, blocks, index)
            low, high = self._row(start, first, count), self._row(stop, first, count)
            with T.If(low < high), T.Then():
                self._block(first, count, low, high)

    def _row(self, work: Any, first: Any, count: Any) -> Any:
        """Return where in the rows of a block a share of all (vector, row) pairs begins or ends."""
        row = tx.truncdiv(work - first * self.row_count, count * _GRAIN) * _GRAIN
        whole = work >= (first + count) * self.row_count
        return _hold(tx.max(tx.Select(whole, self.row_count, row), 0))

    def _block(self, first: Any, count: Any, low: Any, high: Any) -> None:
        """A block of `count` vectors: outputs `low` to `high` of the list."""
        point = _hold(i64(count) * i64(self.col_count) * self.lanes + self.spec.gap, S64)
        products = _hold(self.scratch + point * self.points, S64)
        with T.serial(0, count) as j:
            self._transform_input(first + j, T.bind(self.scratch + i64(j) * self.lanes), count, point)
        most = int32(self.spec.block[0])
        for vectors, rows in enumerate(self.spec.block[1:], 2):
            most = tx.Select(count == vectors, int32(rows), most)
        total = _hold(high - low)
        groups = _blocks(total, _hold(most))
        with T.serial(0, groups) as group:
            begin, size = _balanced(total, groups, group)
            row = _hold(low + begin)
            choose(count, len(self.spec.block), lambda n: self._group(row, size, n, point, products))
            with T.serial(0, size) as i, T.serial(0, count) as j:
                offset = T.bind(products + i64(i * count + j) * (self.points * self.lanes))
                self._transform_output(T.bind(row + i), first + j, offset)

    def _group(self, row: Any, size: Any, vectors: int, point: Any, products: Any) -> None:
        """Branch to the register block of `size` output channels and so many vectors."""
        most = self.spec.block[vectors - 1]
        choose(size, most, lambda rows: self._multiply(row, rows, vectors, point, products))

    def _multiply(self, row: Any, rows: int, vectors: int, point: Any, products: Any) -> None:
        """The matrix products of a register block, for every point."""
        frame, lanes, step = self.frame, self.lanes, self.points * self.lanes
        whole = tx.Ramp(0, 1, lanes)
        weights = [T.bind(i64(frame.rows[row + (1 + i)]) * self.sizes[Shape.U_ROW]) for i in range(rows)]
        with T.serial(0, self.points) as p:
            sums = [[register(self.dtype, lanes) for _ in range(vectors)] for _ in range(rows)]
            shift = T.bind(i64(p) * self.sizes[Shape.U_POINT])
            inputs = T.bind(self.scratch + i64(p) * point)
            for buffer in (buffer for line in sums for buffer in line):
                T.buffer_store(buffer, constant(0.0, self.dtype, lanes), [whole])
            for c in self._inputs(weights, shift):
                channel = T.bind(i64(frame.cols[c + 1]) + shift)
                place = T.bind(inputs + i64(c) * (vectors * lanes))
                x = [T.bind(frame.scratch[tx.Ramp(place + j * lanes, 1, lanes)]) for j in range(vectors)]
                for i in range(rows):
                    weight = T.bind(tx.Broadcast(frame.U[weights[i] + channel], lanes))
                    for j in range(vectors):
                        total = multiply_add(weight, x[j], sums[i][j][whole], self.dtype, self.machine)
                        T.buffer_store(sums[i][j], total, [whole])
            for i in range(rows):
                for j in range(vectors):
                    place = products + i64(p) * lanes + (i * vectors + j) * step
                    T.buffer_store(frame.scratch, sums[i][j][whole], [tx.Ramp(place, 1, lanes)])

    def _inputs(self, weights: list[Any], shift: Any) -> Iterator[Any]:
        """Loop over the listed inputs; with `ahead`, prefetch the weights of every row.

        A large layer's weights come from memory in as many streams as there are rows, and the processor's own
        prefetching starts anew at every point. Listed inputs are prefetched in groups that share a cache line on
        average.
        """
        if not self.spec.ahead:
            with T.serial(0, self.col_count) as c:
                yield c
            return
        inputs = self.frame.shape[int(Shape.U_POINT)]  # all of the layer: a row has so many weights for each point
        group = T.bind(tx.max(tx.truncdiv(self.col_count * self.dtype.line, inputs), 1))
        with T.serial(0, _blocks(self.col_count, group)) as turn:
            first = T.bind(turn * group)
            channel = T.bind(i64(self.frame.cols[first + 1]) + shift)
            for weight in weights:
                prefetch_ahead(self.frame.U, weight + channel)
            with T.serial(first, T.bind(tx.min(first + group, self.col_count))) as c:
                yield c

    def _tiles(self, vector: Any, start: Any) -> list[Any]:
        """Return the offsets of a vector's tiles from the half of the list that begins at `start`."""
        return [T.bind(i64(self.frame.tiles[start + (vector * self.lanes + t)])) for t in range(self.lanes)]

    def _quarters(self, tiles: list[Any]) -> list[list[Any]]:
        """Return the tiles of four vectors that hold four pixels of each."""
        return [tiles[q::4] for q in range(4)]

    def _halves(self, tiles: list[Any]) -> list[list[Any]]:
        """Return the tiles of two vectors that hold two pixels of each."""
        return [[tiles[s + 2 * q + k] for s in range(0, self.lanes, 4) for k in range(2)] for q in range(2)]

    def _transform_input(self, vector: Any, place: Any, count: Any, point: Any) -> None:
        """Transform a vector of tiles of all listed inputs: rows first, as loaded, then columns in lanes."""
        frame, lanes, n = self.frame, self.lanes, self.n
        work = T.bind(self.scratch + self.sizes[Shape.SCRATCH] - self.points * lanes)
        tiles = self._tiles(vector, self.capacity + LIST_HEAD)
        with T.serial(0, self.col_count) as c:
            plane = T.bind(i64(frame.cols[c + 1]) * self.sizes[Shape.X_PLANE])
            lines = [T.bind(plane + self.sizes[Shape.X_PITCH] * y) for y in range(n)]
            for q, quarter in enumerate(self._quarters(tiles)):
                self._transform_rows(lines, quarter, 4, work + q * n * lanes)
            if n == 6:
                for q, half in enumerate(self._halves(tiles), 4):
                    self._transform_rows(lines, [tile + 4 for tile in half], 2, work + q * n * lanes)
            channel = T.bind(place + i64(c) * (i64(count) * lanes))
            with T.serial(0, n) as y:
                x = [T.bind(frame.scratch[tx.Ramp(work + (q * n + y) * lanes, 1, lanes)]) for q in range(n)]
                columns = transpose4(x[:4], lanes) + (even_odd(x[4], x[5], lanes) if n == 6 else [])
                for i, value in enumerate(input_transform(columns, self.spec.m, self.dtype, lanes)):
                    target = channel + (i64(y * n) + i) * point
                    T.buffer_store(frame.scratch, value, [tx.Ramp(target, 1, lanes)])

    def _transform_rows(self, lines: list[Any], tiles: list[Any], width: int, work: Any) -> None:
        """Transform along y: `width` pixels of several tiles side by side."""
        x = [gather(self.frame.X, [line + tile for tile in tiles], width) for line in lines]
        for y, value in enumerate(input_transform(x, self.spec.m, self.dtype, self.lanes)):
            T.buffer_store(self.frame.scratch, value, [tx.Ramp(work + y * self.lanes, 1, self.lanes)])

    def _transform_output(self, row: Any, vector: Any, place: Any) -> None:
        """Transform one output channel of a vector of tiles back, and store it."""
        frame, lanes, n, m = self.frame, self.lanes, self.n, self.spec.m
        channel = T.bind(i64(frame.rows[row + 1]))
        bias = T.bind(tx.Broadcast(frame.B[channel], lanes))
        tiles = self._tiles(vector, LIST_HEAD)
        load = [
            [T.bind(frame.scratch[tx.Ramp(place + (y * n + x) * lanes, 1, lanes)]) for y in range(n)] for x in range(n)
        ]
        columns = [output_transform(column, m, self.dtype, lanes) for column in load]
        for y in range(m):
            line = T.bind(self.sizes[Shape.Y_PITCH] * y)
            values = [
                T.bind(value + bias)
                for value in output_transform([column[y] for column in columns], m, self.dtype, lanes)
            ]
            if m == 4:
                pixels = transpose4(values, lanes)
                owners = [tiles[q::4] for q in range(4)]
            else:
                pixels = interleave(values[0], values[1], lanes)
                owners = [
                    [tiles[4 * s + 2 * half + k] for s in range(lanes // 4) for k in range(2)] for half in range(2)
                ]
            for value, owner in zip(pixels, owners, strict=True):
                self._store(value, [T.bind(tile + line) for tile in owner], T.bind(channel * self.sizes[Shape.Y_PLANE]))

    def _store(self, value: Any, places: list[Any], plane: Any) -> None:
        """Store m pixels of a row at each place, after the epilogue."""
        frame, spec, lanes = self.frame, self.spec, self.lanes
        if spec.residual:
            value = value + gather(frame.R, [plane + place for place in places], spec.m)
        if spec.relu:
            value = tx.max(value, constant(0.0, self.dtype, lanes))
        if spec.inside:
            value = keep_inside(value, gather(frame.inside, places, spec.m), self.dtype, lanes)
        value = T.bind(value)
        for i, place in enumerate(places):
            part = value if len(places) == 1 else tx.Shuffle([value], list(range(i * spec.m, (i + 1) * spec.m)))
            T.buffer_store(frame.Y, part, [tx.Ramp(plane + place, 1, spec.m)])


def _blocks(count: Any, by: Any) -> Any:
    return _hold(ceil_div(count, by))


def _balanced(count: Any, parts: Any, index: Any) -> tuple[Any, Any]:
    """Return begin and size of part `index` when `count` things are divided evenly: sizes differ by one at most."""
    size = _hold(tx.truncdiv(count, parts))
    return Groups(0, parts, size, _hold(count - size * parts)).group(index, _hold)


def _hold(value: Any, dtype: DType = S32) -> Any:
    """Bind a value through a variable in memory, which LLVM makes a register.

    TVM's simplifier looks through a plain binding: a chain of them with divisions and selections grows until
    a kernel takes minutes to compile.
    """
    memory = register(dtype, 1)
    T.buffer_store(memory, value, [0])
    return T.bind(memory[0])
