"""Index tables from tiles to pixel rows.

A tile's table lists the pixels it covers, or the windows a convolution reads for them, as rows of
the pixel-row layout (`dvexport.dialect.rows`): frame * H * W + y * W + x, and the zero row
for what lies outside the plane. Cells of a grid that does not divide the plane cover
unequal numbers of pixels; short cells repeat their last pixel, which writes the same value twice.
"""

from __future__ import annotations

import numpy as np

from dvexport.dialect.masks import tile_index

__all__ = ["even_tile", "tile_pixels", "windows", "winograd_tiles"]


def tile_pixels(size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Return (y, x) of the pixels of each cell, `[gh*gw, most pixels in a cell, 2]`."""
    cells = [
        np.stack(np.meshgrid(ys, xs, indexing="ij"), axis=-1).reshape(-1, 2)
        for ys in _members(size[0], grid[0])
        for xs in _members(size[1], grid[1])
    ]
    most = max(len(cell) for cell in cells)
    return np.stack([np.concatenate([cell, np.repeat(cell[-1:], most - len(cell), axis=0)]) for cell in cells])


def even_tile(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int] | None:
    """Return the height and width of every cell, or None if cells differ."""
    if size[0] % grid[0] or size[1] % grid[1]:
        return None
    return size[0] // grid[0], size[1] // grid[1]


def windows(
    pixels: np.ndarray,
    size: tuple[int, int],
    frames: int,
    kernel: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, ...] = (0, 0, 0, 0),
    dilations: tuple[int, int] = (1, 1),
) -> np.ndarray:
    """Return the input rows each output pixel reads.

    Args:
        pixels: output (y, x), `[cells, k, 2]`.
        size: the input plane.
        frames: number of frames; the table repeats for each.
        kernel, strides, pads, dilations: the convolution's.

    Returns:
        int64 `[frames * cells, k, kh * kw]`; the row past the last pixel stands for zero.
    """
    taps = np.stack(np.meshgrid(np.arange(kernel[0]), np.arange(kernel[1]), indexing="ij"), axis=-1)
    offsets = taps.reshape(-1, 2) * dilations - np.array(pads[:2])
    at = pixels[:, :, None, :] * np.array(strides) + offsets
    inside = ((at >= 0) & (at < np.array(size))).all(axis=-1)
    plane = size[0] * size[1]
    local = at[..., 0] * size[1] + at[..., 1]
    frame = np.arange(frames).reshape(-1, 1, 1, 1) * plane
    table = np.where(inside[None], local[None] + frame, frames * plane)
    return table.reshape(-1, *local.shape[1:]).astype(np.int64)


def winograd_tiles(size: tuple[int, int], grid: tuple[int, int], step: int) -> np.ndarray:
    """Return (y, x) of the first pixel of each `step` x `step` patch of each cell, `[gh*gw, patches, 2]`.

    Cells must be even and `step` divide them.
    """
    pixels = tile_pixels(size, grid)
    first = pixels[:, :1]
    patch = ((pixels - first) % step == 0).all(axis=-1)
    return np.stack([cell[chosen] for cell, chosen in zip(pixels, patch, strict=True)])


def _members(size: int, grid: int) -> list[np.ndarray]:
    if grid > size:
        raise ValueError(f"a grid of {grid} cells is finer than {size} pixels")
    index = tile_index(size, grid)
    return [np.flatnonzero(index == cell) for cell in range(grid)]
