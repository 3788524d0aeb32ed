"""Register blocks of matrix products, as the kernels of transformers share them.

A block is a few rows of A times a panel of B, a panel being a few vectors of neighbouring columns; its sums stay in
registers over the whole depth. A is read where it lies, one number at a time and repeated in all lanes; B comes
as panels `[depth][columns of the panel]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.abi import i64
from dvexport.targets.tvm.kernels.vectors import ceil_div, constant, int32, load, register, splat, store
from dvexport.targets.tvm.machine import by_lanes
from dvexport.targets.tvm.machine.dtype import dtype_of
from dvexport.targets.tvm.machine.machine import Machine

__all__ = ["Groups", "Rows", "balanced", "product", "register_block"]

_UNROLL = 4
"""Depth of one turn of the loop. AArch64 loads so many numbers of a row at once, and multiplies by each lane."""


def register_block(machine: Machine) -> tuple[int, int]:
    """Return rows and vectors of the largest block that stays in registers."""
    return by_lanes.product_block(machine.lanes) or machine.block


@dataclass(frozen=True)
class Groups:
    """Items in groups of nearly equal size, at most the block's: the first `longer` hold one more than `size`."""

    first: Any
    count: Any
    size: Any
    longer: Any

    def group(self, index: Any, keep: Callable[[Any], Any] = T.bind) -> tuple[Any, Any]:
        """First item and number of items of a group; `keep` binds a value."""
        start = keep(self.first + index * self.size + tx.min(index, self.longer))
        return start, keep(self.size + tx.Select(index < self.longer, int32(1), int32(0)))


def balanced(first: Any, stop: Any, largest: Any) -> Groups:
    """Cut a range of items into groups of at most `largest`."""
    count = T.bind(ceil_div(stop - first, largest))
    size = T.bind(tx.truncdiv(stop - first, tx.max(count, int32(1))))
    return Groups(first, count, size, T.bind(stop - first - count * size))


@dataclass(frozen=True)
class Rows:
    """Rows of A: where row 0 begins and how far the next is, in elements (int64); neighbours of a row are adjacent."""

    buffer: Any
    first: Any
    stride: Any


def product(
    rows: Rows,
    count: int,
    panel: tuple[Any, Any, Any],
    depth: Any,
    tile: tuple[Any, Any, Any],
    sizes: tuple[int, int],
    machine: Machine,
    *,
    starts: Callable[[int, int], Any] | None = None,
) -> None:
    """Write `count` rows x a panel of vectors, summed over `depth`, to a tile.

    Args:
        rows: A.
        count: rows of the block.
        panel: B's buffer, its first element, and the elements from one depth to the next.
        depth: products of a sum.
        tile: a buffer, its first element, and the elements from one row to the next.
        sizes: vectors of the panel, and lanes of a vector.
        machine: what to generate code for.
        starts: what a sum starts from, by row and vector; zero by default.
    """
    vectors, lanes = sizes
    buffer, origin, pitch = panel
    dtype = dtype_of(tile[0].dtype)
    sums = [[register(dtype, lanes) for _ in range(vectors)] for _ in range(count)]
    for row, line in enumerate(sums):
        for vector, total in enumerate(line):
            store(total, 0, constant(0.0, dtype, lanes) if starts is None else starts(row, vector), lanes)
    firsts = [T.bind(rows.first + rows.stride * row) for row in range(count)]

    def step(k: Any, factors: list[Any]) -> None:
        at = T.bind(origin + k * pitch)
        columns = [T.bind(load(buffer, at + vector * lanes, lanes)) for vector in range(vectors)]
        for line, factor in zip(sums, factors, strict=True):
            value = T.bind(factor)
            for total, column in zip(line, columns, strict=True):
                store(total, 0, load(total, 0, lanes) + value * column, lanes)

    def broadcast(k: Any) -> list[Any]:
        return [splat(rows.buffer[first + k], lanes) for first in firsts]

    turns = T.bind(tx.truncdiv(depth, _UNROLL))
    with T.serial(0, turns) as turn:
        k = T.bind(i64(turn * _UNROLL))
        if machine.is_aarch64:
            fours = [T.bind(load(rows.buffer, first + k, _UNROLL)) for first in firsts]
            for each in range(_UNROLL):
                step(T.bind(k + each), [tx.Shuffle([four], [each] * lanes) for four in fours])
        else:
            for each in range(_UNROLL):
                step(T.bind(k + each), broadcast(k + each))
    with T.serial(turns * _UNROLL, depth) as left:
        k = T.bind(i64(left))
        step(k, broadcast(k))
    target, at, apart = tile
    for row, line in enumerate(sums):
        for vector, total in enumerate(line):
            store(target, at + apart * row + vector * lanes, load(total, 0, lanes), lanes)
