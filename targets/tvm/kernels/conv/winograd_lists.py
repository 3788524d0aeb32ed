"""What a Winograd convolution is called with: its `shape`, its transformed weights, its scratch and its tile lists."""

from __future__ import annotations

import itertools

import numpy as np

from dvexport.targets.tvm.kernels.conv.direct_data import Runs
from dvexport.targets.tvm.kernels.conv.winograd_points import weight_matrix
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.machine.machine import Machine

__all__ = ["SHAPE", "dense_split", "dense_tiles", "row_floats", "tile_cells", "winograd_shape", "winograd_weights"]

SHAPE = ("x_plane", "x_pitch", "y_plane", "y_pitch", "u_row", "u_point", "scratch")
"""Elements of the int32 buffer `shape`, all in floats: from one input channel to the next, from one of its rows
to the next, the same of the output, from one output channel's weights to the next, from one point's weights to
the next, and from one thread's scratch to the next."""

_ROW_GAP = 16
"""Floats between two rows of weights. Rows are a power of two long: without it all would fall into one cache set."""

_LIST_HEAD = 16

_WORTH_SPLITTING = 0.5
"""Multiplications left over, of those of a vector of tiles, up to which a second call gains."""


def row_floats(m: int, cin: int) -> int:
    """Return the floats of an output channel's weights."""
    return (m + 2) ** 2 * cin + _ROW_GAP


def winograd_shape(m: int, plane_in: Plane, plane_out: Plane, cin: int, part_floats: int) -> np.ndarray:
    """Return the int32 buffer `shape`.

    Args:
        m: edge of an output tile.
        plane_in, plane_out: the layout of a channel of X, and of R and Y.
        cin: input channels.
        part_floats: scratch of one thread; `winograd.part_floats` knows it.
    """
    sizes = (plane_in.size, plane_in.pitch, plane_out.size, plane_out.pitch, row_floats(m, cin), cin, part_floats)
    return np.array(sizes, np.int32)


def winograd_weights(weights: np.ndarray, m: int) -> np.ndarray:
    """Return the buffer `U`, float32 `[cout, row_floats]`: for every point the weights of the input channels.

    Args:
        weights: `[cout, cin, 3, 3]`.
        m: edge of an output tile.
    """
    cout, cin = weights.shape[:2]
    matrix = weight_matrix(m)
    points = np.einsum("pk,ockl,ql->opqc", matrix, weights.astype(np.float64), matrix)
    packed = np.zeros((cout, row_floats(m, cin)), np.float32)
    packed[:, : points[0].size] = points.reshape(cout, -1)
    return packed


def dense_tiles(plane_in: Plane, plane_out: Plane, m: int, machine: Machine) -> np.ndarray:
    """Return the tile list of a whole image, row by row; where m does not divide it, tiles overshoot its edge."""
    ys, xs = np.arange(0, plane_out.height, m), np.arange(0, plane_out.width, m)
    return _tile_list(_corners(plane_out, ys, xs, shift=0), _corners(plane_in, ys, xs, shift=1), machine)


def dense_split(plane_in: Plane, plane_out: Plane, m: int, machine: Machine) -> tuple[np.ndarray, Runs] | None:
    """Return the tiles of an image that fill whole vectors, and the few left over as runs of the direct convolution.

    A vector costs the same with one tile in it, so at 28 x 28 with 16 lanes, 48 tiles and one done directly
    take 12 % less time than 49 tiles.

    Returns:
        A tile list and runs of m pixels that together are the image; or nothing where there is no gain.
    """
    height, width, lanes = plane_out.height, plane_out.width, machine.lanes
    tiles = -(-height // m) * -(-width // m)
    left = tiles % lanes
    direct_products = -(-left * m * m // lanes) * 9
    if height % m or width % m or not left or left == tiles or direct_products > _WORTH_SPLITTING * (m + 2) ** 2:
        return None
    ys, xs = np.arange(0, height, m), np.arange(0, width, m)
    outputs, inputs = _corners(plane_out, ys, xs, shift=0), _corners(plane_in, ys, xs, shift=1)
    lines = np.arange(m)
    starts = np.array([0, left * m])
    run_outputs, run_inputs = (
        (corners[-left:, None].astype(np.int64) + lines * pitch).ravel()
        for corners, pitch in ((outputs, plane_out.pitch), (inputs, plane_in.pitch))
    )
    return _tile_list(outputs[:-left], inputs[:-left], machine), Runs(m, False, starts, run_outputs, run_inputs)


def _tile_list(outputs: np.ndarray, inputs: np.ndarray, machine: Machine) -> np.ndarray:
    vectors = -(-outputs.size // machine.lanes)
    spare = vectors * machine.lanes - outputs.size
    head = np.zeros(_LIST_HEAD, np.int32)
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
