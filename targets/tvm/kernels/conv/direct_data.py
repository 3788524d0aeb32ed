"""What a direct convolution reads beside tensors: its sizes, its weights' layout and its lists of pixels.

A *run* is a few neighbouring output pixels of one row; a run list names the pixels to compute. Entry `[0]` is the
number of vectors, `[1]` the capacity in runs. From 16 on lie the offsets of the runs in a Y plane, and `capacity`
entries further those of their windows' first pixels in an X plane. A vector is `lanes / run` successive runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise, product
from math import prod

import numpy as np

from dvexport.targets.tvm.kernels.bounds import LIST_HEAD
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.machine.dtype import F32, DType
from dvexport.targets.tvm.machine.machine import Machine

__all__ = [
    "HALVES",
    "Runs",
    "Shape",
    "Window",
    "cell_bounds",
    "dense_runs",
    "direct_shape",
    "direct_weights",
    "run_list",
    "scratch_floats",
    "tile_runs",
]

HALVES = 4
"""Vectors that the even and the odd columns of a row take, for a vector of windows: two each."""

_CACHE = 384 * 1024
"""Bytes of input that all rows pass over together: they should stay in a core's second level cache."""

_WEIGHTS_CACHE = 512 * 1024
"""Bytes of weights above which threads rather share rows than pixels, so that each reads a part of the weights."""


class Shape(IntEnum):
    """Entries of the constant `shape`."""

    X_PLANE = 0
    """Elements of an input plane."""
    Y_PLANE = 1
    """Elements of an output plane."""
    W_ROW = 2
    """Elements of one output channel's weights."""
    TAPS = 3
    """Pixels of a window."""
    SCRATCH = 4
    """Elements of a thread's slice of scratch."""
    TOGETHER = 5
    """Elements of input that a block of panels reads: packed windows, or pixels."""
    PREFER_ROWS = 6
    """1: threads share the rows even where sharing the pixels is as fair."""
    FIRST_TAP = 16
    """From here on the offset of every tap in an input plane."""


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution over any number of spatial axes, depth first.

    Attributes:
        kernel: pixels of a window along each axis.
        strides: from one output pixel's window to the next; 1 where it is left out.
        pads: before the image; what lies after it follows from the output's size. 0 where it is left out.
        dilations: from one pixel of a window to the next; 1 where it is left out.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Fill in what is left out: windows side by side, of neighbouring pixels, inside the image."""
        for name, otherwise in (("strides", 1), ("pads", 0), ("dilations", 1)):
            given = getattr(self, name) or (otherwise,) * self.rank
            if len(given) != self.rank:
                raise ValueError(f"a window of {self.kernel} pixels has {name} of {given}")
            object.__setattr__(self, name, tuple(given))

    @property
    def rank(self) -> int:
        """Spatial axes."""
        return len(self.kernel)

    @property
    def size(self) -> int:
        """Pixels of a window."""
        return prod(self.kernel)

    def first(self, x: Plane, *pixel: int) -> int:
        """Offset in an input plane of the first pixel of an output pixel's window."""
        axes = zip(pixel, self.strides, self.pads, strict=True)
        return x.offset(*(index * stride - pad for index, stride, pad in axes))

    def check(self, x: Plane, y: Plane) -> None:
        """Raise ValueError where a window leaves the planes' padding, or has other axes than they."""
        if not self.rank == x.rank == y.rank:
            raise ValueError(f"{self}, {x} and {y} differ in their number of spatial axes")
        for axis, (size, out) in enumerate(zip(x.shape, y.shape, strict=True)):
            last = (out - 1) * self.strides[axis] - self.pads[axis] + (self.kernel[axis] - 1) * self.dilations[axis]
            if max(self.pads[axis], last - size + 1) > x.pad:
                raise ValueError(f"{self} over {x} to {y} reads beyond the padding")


@dataclass(frozen=True)
class Runs:
    """The runs of the cells of a plane.

    Attributes:
        run: output pixels of a run.
        inside: whether runs cover the padding between rows, where the kernel must write zeros.
        starts: `[cells + 1]`, the first run of every cell.
        outputs, inputs: `[runs]`, offsets in the planes.
    """

    run: int
    inside: bool
    starts: np.ndarray
    outputs: np.ndarray
    inputs: np.ndarray

    def vectors(self, lanes: int) -> int:
        """Vectors that all of them fill."""
        return -(-len(self.outputs) // (lanes // self.run))

    def table(self) -> np.ndarray:
        """Int32 `[cells + 1 starts][output offsets][input offsets]`, for the kernel that lists active cells' runs."""
        return np.concatenate([self.starts, self.outputs, self.inputs]).astype(np.int32)


def direct_shape(
    x: Plane,
    y: Plane,
    window: Window,
    channels: tuple[int, int],
    *,
    packed: bool,
    block: tuple[int, int],
    columns: int,
    machine: Machine,
    dtype: DType = F32,
    vectors: int | None = None,
) -> np.ndarray:
    """Return the int32 constant `shape` of a layer.

    Args:
        x, y: layout of the input and output planes.
        window: geometry of the convolution.
        channels: input and output channels.
        packed, block, columns, dtype: as in the kernel's `DirectConv`.
        machine: as in the kernel.
        vectors: the most vectors of pixels that a call computes; None: any number.
    """
    window.check(x, y)
    shape = np.zeros(Shape.FIRST_TAP + window.size, np.int32)
    weights = window.size * channels[0] * channels[1]
    shape[Shape.X_PLANE], shape[Shape.Y_PLANE] = x.size, y.size
    shape[Shape.W_ROW] = _weight_row(channels[0] * window.size, dtype)
    shape[Shape.TAPS] = window.size
    shape[Shape.SCRATCH] = _slice(window.size, channels[0], packed, block, columns, machine, dtype, vectors)
    shape[Shape.TOGETHER] = _CACHE // dtype.bytes
    shape[Shape.PREFER_ROWS] = dtype.size(weights) > _WEIGHTS_CACHE
    shape[Shape.FIRST_TAP :] = x.taps(window.kernel, window.dilations)
    return shape


def direct_weights(weights: np.ndarray, dtype: DType = F32) -> np.ndarray:
    """Return `[cout, row]` of `[cout, cin, *kernel]`; rows are padded so that they don't share cache sets."""
    flat = weights.reshape(len(weights), -1)
    rows = np.zeros((len(flat), _weight_row(flat.shape[1], dtype)), dtype.array)
    rows[:, : flat.shape[1]] = flat
    return rows


def scratch_floats(
    size: int,
    channels: int,
    threads: int,
    *,
    packed: bool,
    block: tuple[int, int],
    columns: int,
    machine: Machine,
    dtype: DType = F32,
    vectors: int | None = None,
) -> int:
    """Return the elements of `scratch` for `threads` parts of a layer with `channels` inputs and windows of `size`.

    The rest is as in `direct_shape`.
    """
    return threads * _slice(size, channels, packed, block, columns, machine, dtype, vectors)


def dense_runs(x: Plane, y: Plane, window: Window, machine: Machine) -> Runs:
    """Return the runs of a whole plane, as one cell.

    Where both planes have the same strides and windows lie side by side these are whole vectors, over rows and
    padding alike.
    """
    window.check(x, y)
    if max(window.strides) > 1 or x.strides != y.strides:
        return tile_runs(x, y, window, (1,) * y.rank, machine)
    first = y.offset(*(0,) * y.rank)
    steps = np.arange(0, y.offset(*(size - 1 for size in y.shape)) + 1 - first, machine.lanes)
    starts = np.array([0, len(steps)])
    return Runs(machine.lanes, True, starts, first + steps, window.first(x, *(0,) * y.rank) + steps)


def tile_runs(x: Plane, y: Plane, window: Window, grid: Sequence[int], machine: Machine) -> Runs:
    """Return the runs of the cells of a tile grid: pixel row r is of grid row floor(r * gh / height), columns alike.

    The last run of a cell's row is moved left to end with the cell, where the run's length doesn't divide it.

    Args:
        x, y: layout of the input and output planes.
        window: geometry of the convolution.
        grid: cells along each spatial axis.
        machine: what to generate code for.
    """
    window.check(x, y)
    *outer, columns = (cell_bounds(cells, size) for cells, size in zip(grid, y.shape, strict=True))
    widths = [stop - start for start, stop in columns if stop > start]
    run = min(_run_lengths(machine.lanes, min(widths)), key=lambda length: _run_cost(length, widths, machine.lanes))
    starts, outputs, inputs = [0], [], []
    for *lines, (left, right) in product(*outer, columns):
        for line in product(*(range(*bounds) for bounds in lines)):
            for column in _run_starts(left, right, run):
                outputs.append(y.offset(*line, column))
                inputs.append(window.first(x, *line, column))
        starts.append(len(outputs))
    return Runs(run, False, *(np.array(part, np.int64) for part in (starts, outputs, inputs)))


def run_list(runs: Runs, cells: np.ndarray, machine: Machine) -> np.ndarray:
    """Return the int32 run list of the active `cells` (bool): what the list kernel makes."""
    chosen = [index for cell in np.flatnonzero(cells) for index in range(runs.starts[cell], runs.starts[cell + 1])]
    pieces = machine.lanes // runs.run
    vectors = -(-len(chosen) // pieces)
    chosen += chosen[-1:] * (vectors * pieces - len(chosen))
    capacity = runs.vectors(machine.lanes) * pieces
    made = np.zeros(LIST_HEAD + 2 * capacity, np.int32)
    made[:2] = vectors, capacity
    made[LIST_HEAD : LIST_HEAD + len(chosen)] = runs.outputs[chosen]
    made[LIST_HEAD + capacity : LIST_HEAD + capacity + len(chosen)] = runs.inputs[chosen]
    return made


def cell_bounds(cells: int, size: int) -> list[tuple[int, int]]:
    """First and last + 1 pixel of every cell of an axis, where pixel p is of cell floor(p * cells / size)."""
    edges = [-(-cell * size // cells) for cell in range(cells + 1)]
    return list(pairwise(edges))


def _run_lengths(lanes: int, width: int) -> Iterator[int]:
    length = 1
    while length <= min(lanes, width):
        yield length
        length *= 2


def _run_cost(run: int, widths: list[int], lanes: int) -> float:
    """Pixels computed, and what it takes to put a vector together from several runs."""
    return sum(-(-width // run) * run for width in widths) * (1 + 0.01 * (lanes // run))


def _run_starts(left: int, right: int, run: int) -> Iterator[int]:
    for column in range(left, right, run):
        yield min(column, right - run)


def _weight_row(depth: int, dtype: DType) -> int:
    return (-(-depth // dtype.line) + 1) * dtype.line


def _slice(
    size: int, channels: int, packed: bool, block: tuple[int, int], columns: int, machine: Machine, dtype: DType,
    most: int | None,
) -> int:  # fmt: skip
    """Elements of one thread's scratch: a register block, and the packed windows of a block of panels."""
    panel_row = block[1] * machine.lanes
    panel = (size // columns * HALVES if columns else size) * channels * panel_row
    windows = max(_CACHE // dtype.bytes, panel) if packed else 0
    if most is not None:
        windows = min(windows, -(-most // block[1]) * panel)
    return -(-(block[0] * panel_row + windows) // dtype.line) * dtype.line
