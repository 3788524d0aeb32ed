"""What a direct convolution prefetches.

A 1 x 1 window has few products for what it moves. At 14 x 14 in ResNet-50 a third of the time was spent waiting for the
weights, the pixels that are added and those that are written, one after the other. So they are prefetched while a
register block is summed, a few lines for every `LINE` input channels. These are the weights of the next group of rows,
and the pixels of the block's own tile, which are needed when the block ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.abi import Frame, i64, prefetch

__all__ = ["ask_for_tile", "ask_for_weights"]


def ask_for_weights(frame: Frame, first: Any, count: int, w_row: Any, col: Any) -> None:
    """Ask for the weights of the rows after the `count` ones from `first` of the list, at place `col` of the inputs.

    Past the end of the list it is the last row's.
    """
    last = T.bind(frame.rows[i64(0)] - 1)
    channel = T.bind(i64(frame.cols[i64(col) + 1]))
    with T.serial(0, count) as i:
        row = T.bind(i64(frame.rows[i64(tx.min(first + count + i, last)) + 1]))
        prefetch(frame.W, row * w_row + channel, near=False)


def ask_for_tile(frame: Frame, row: Any, offsets: Sequence[Any], y_plane: Any, *, residual: bool) -> None:
    """Ask for the pixels of Y, to write them, and of R, at `offsets` in the plane of a row of the list."""
    plane = T.bind(i64(frame.rows[i64(row) + 1]) * y_plane)
    for offset in offsets:
        prefetch(frame.Y, plane + offset, write=True)
        if residual:
            prefetch(frame.R, plane + offset)
