"""What a Winograd convolution is called with: its `shape`, its scratch and its tile lists."""

from __future__ import annotations

import itertools
from enum import IntEnum

import numpy as np

from dvexport.targets.tvm.kernels.bounds import LIST_HEAD
from dvexport.targets.tvm.kernels.plane import Plane, require_two_axes
from dvexport.targets.tvm.machine.dtype import F32, DType
from dvexport.targets.tvm.machine.machine import Machine

__all__ = ["Shape", "dense_tiles", "row_floats", "tile_cells", "winograd_shape"]


class Shape(IntEnum):
    """Entries of the int32 constant `shape`, all in elements."""

    X_PLANE = 0
    """From one input channel to the next."""
    X_PITCH = 1
    """From one row of it to the next."""
    Y_PLANE = 2
    Y_PITCH = 3
    U_ROW = 4
    """From one output channel's weights to the next."""
    U_POINT = 5
    """From one point's weights to the next: input channels of the layer."""
    SCRATCH = 6
    """From one thread's scratch to the next."""


def row_floats(m: int, cin: int, dtype: DType = F32) -> int:
    """Return the elements of an output channel's weights.

    Rows are a power of two long: without a cache line between them all would fall into one cache set.
    """
    return (m + 2) ** 2 * cin + dtype.line


def winograd_shape(m: int, plane_in: Plane, plane_out: Plane, cin: int, part: int) -> np.ndarray:
    """Return the int32 buffer `shape`.

    Args:
        m: edge of an output tile.
        plane_in, plane_out: the layout of a channel of X, and of R and Y.
        cin: input channels.
        part: scratch of one thread; `winograd.part_floats` knows it.

    Raises:
        UsageError: a plane has not two spatial axes.
    """
    require_two_axes("a Winograd convolution", plane_in, plane_out)
    u_row = row_floats(m, cin, plane_in.dtype)
    sizes = (plane_in.size, plane_in.pitch, plane_out.size, plane_out.pitch, u_row, cin, part)
    return np.array(sizes, np.int32)


def dense_tiles(plane_in: Plane, plane_out: Plane, m: int, machine: Machine) -> np.ndarray:
    """Return the tile list of a whole image, row by row; where m does not divide it, tiles overshoot its edge."""
    ys, xs = np.arange(0, plane_out.height, m), np.arange(0, plane_out.width, m)
    return _tile_list(_corners(plane_out, ys, xs, shift=0), _corners(plane_in, ys, xs, shift=1), machine)


def _tile_list(outputs: np.ndarray, inputs: np.ndarray, machine: Machine) -> np.ndarray:
    vectors = -(-outputs.size // machine.lanes)
    spare = vectors * machine.lanes - outputs.size
    head = np.zeros(LIST_HEAD, np.int32)
    head[:2] = vectors, vectors * machine.lanes
    return np.concatenate([head, np.pad(outputs, (0, spare), "edge"), np.pad(inputs, (0, spare), "edge")])


def tile_cells(plane_in: Plane, plane_out: Plane, grid: tuple[int, int], m: int) -> np.ndarray | None:
    """Return the output tiles of every cell of a gate's grid.

    Pixel y belongs to the cell row floor(y * grid height / height); columns alike.

    Args:
        plane_in, plane_out: the layout of a channel of X and of Y.
        grid: rows and columns of cells.
        m: edge of an output tile.

    Returns:
        int32 `[cells + 1 starts][output offsets][input offsets]`, cells row by row; or nothing if a cell
        is not made of whole tiles. At the right and bottom edge of the image a tile may overshoot: then the
        convolution needs `inside`.
    """
    rows = _edges(plane_out.height, grid[0], m)
    columns = _edges(plane_out.width, grid[1], m)
    if rows is None or columns is None:
        return None
    starts, outputs, inputs = [0], [], []
    for top, bottom in itertools.pairwise(rows):
        for left, right in itertools.pairwise(columns):
            ys, xs = np.arange(top, bottom, m), np.arange(left, right, m)
            outputs.append(_corners(plane_out, ys, xs, shift=0))
            inputs.append(_corners(plane_in, ys, xs, shift=1))
            starts.append(starts[-1] + ys.size * xs.size)
    return np.concatenate([np.array(starts, np.int32), *outputs, *inputs])


def _edges(size: int, cells: int, m: int) -> list[int] | None:
    """First pixel of every cell and the end of the last, if all but the last edge are multiples of m."""
    edges = [-(-cell * size // cells) for cell in range(cells + 1)]
    return None if any(edge % m for edge in edges[:-1]) else edges


def _corners(plane: Plane, ys: np.ndarray, xs: np.ndarray, shift: int) -> np.ndarray:
    first = plane.offset(-shift, -shift)
    return (first + ys[:, None] * plane.pitch + xs[None, :]).ravel().astype(np.int32)
