"""How tile masks and channel masks meet a plane: shared by references and lowerings."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dvexport.graph.graph import Builder

__all__ = ["channel_mask", "share_of", "tile_index", "upsample"]


def tile_index(size: int, grid: int) -> np.ndarray:
    """Return for each pixel of an axis the cell it reads: floor(y * grid / size)."""
    return np.arange(size) * grid // size


def upsample(build: Builder, tiles: ir.Value, size: tuple[int, int]) -> ir.Value:
    """Upsample a tile mask `[N, gh, gw]` by the nearest rule to `[N, 1, *size]`."""
    assert tiles.shape is not None
    for axis in (1, 2):
        index = tile_index(size[axis - 1], int(tiles.shape[axis]))  # type: ignore[arg-type]
        shape = [*tiles.shape[:axis], size[axis - 1], *tiles.shape[axis + 1 :]]  # type: ignore[union-attr]
        tiles = build.op(
            "Gather", tiles, build.const(index.astype(np.int64)), axis=axis, shape=shape, dtype=tiles.dtype
        )
    return build.op("Unsqueeze", tiles, build.ints(1))


def channel_mask(build: Builder, mask: ir.Value) -> ir.Value:
    """View a channel mask `[N, C]` as `[N, C, 1, 1]`."""
    return build.op("Unsqueeze", mask, build.ints(2, 3))


def share_of(build: Builder, action: ir.Value, value: int) -> ir.Value:
    """1.0 in the channels of an action `[N, C]` that are `value`, 0.0 elsewhere.

    Multiplying by it is what the published code does, and several times faster than selecting.
    """
    return build.op("Cast", build.op("Equal", action, build.const(value, np.int64)), to=ir.DataType.FLOAT)
