"""Keys and values of a head as panels, which the products of attention read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.abi import i64
from dvexport.targets.tvm.kernels.vectors import int32, load, store

__all__ = ["Keys", "Values", "pack_keys", "pack_values"]


@dataclass(frozen=True)
class Keys:
    """Where keys lie: the first float, and how far it is from key to key and from one depth to the next, in floats."""

    buffer: Any
    first: Any
    row: Any
    column: Any
    count: Any
    depth: Any


@dataclass(frozen=True)
class Values:
    """Where values lie: the first float, and how far it is from row to row; neighbours of a row are adjacent."""

    buffer: Any
    first: Any
    row: Any
    count: Any
    width: Any


def pack_keys(keys: Keys, target: Any, origin: Any, panels: Any, sizes: tuple[int, int]) -> None:
    """Copy keys to panels `[depth][keys of the panel]`; what lies beyond the last key is the last key again.

    Args:
        keys: in squares of vectors where a key is contiguous, one by one where not.
        target: the buffer of panels.
        origin: its first float.
        panels: how many.
        sizes: vectors of a panel, and lanes of a vector.
    """
    vectors, lanes = sizes
    panel, none = vectors * lanes, int32(0)
    squares = T.bind(tx.Select(tx.EQ(keys.column, i64(1)), tx.truncdiv(keys.depth, lanes), none))
    with T.serial(0, panels * vectors) as vector:
        number, place = tx.truncdiv(vector, vectors), tx.truncmod(vector, vectors)
        at = T.bind(origin + i64(number) * panel * i64(keys.depth) + i64(place * lanes))
        first = T.bind(vector * lanes)
        with T.If(first + lanes <= keys.count):
            with T.Then():
                begin = T.bind(keys.first + i64(first) * keys.row)
                with T.serial(0, squares) as square:
                    depth = T.bind(i64(square) * lanes)
                    _transpose((keys.buffer, begin + depth, keys.row), (target, at + depth * panel, panel), lanes)
                _one_by_one(keys, first, squares * lanes, (target, at, panel), lanes)
            with T.Else():
                _one_by_one(keys, first, none, (target, at, panel), lanes)


def _one_by_one(keys: Keys, first: Any, start: Any, panel: tuple[Any, Any, int], lanes: int) -> None:
    """Copy a vector of keys from the depth `start` on."""
    target, at, pitch = panel
    with T.serial(0, lanes) as each:
        begin = T.bind(keys.first + i64(tx.min(first + each, keys.count - 1)) * keys.row)
        with T.serial(start, keys.depth) as k:
            store(target, at + i64(k) * pitch + i64(each), keys.buffer[begin + i64(k) * keys.column], 1)


def _transpose(rows: tuple[Any, Any, Any], panel: tuple[Any, Any, int], lanes: int) -> None:
    """Copy `lanes` x `lanes` floats, rows to columns: two halves are interleaved, as often as a vector has halves."""
    (source, begin, row), (target, at, pitch), half = rows, panel, lanes // 2
    vectors = [T.bind(load(source, begin + row * each, lanes)) for each in range(lanes)]
    order = [[offset + lane // 2 + lanes * (lane % 2) for lane in range(lanes)] for offset in (0, half)]
    for _ in range(lanes.bit_length() - 1):
        pairs = zip(vectors[:half], vectors[half:], strict=True)
        vectors = [T.bind(tx.Shuffle([a, b], indices)) for a, b in pairs for indices in order]
    for each, vector in enumerate(vectors):
        store(target, at + each * pitch, vector, lanes)


def pack_values(values: Values, target: Any, origin: Any, sizes: tuple[int, int]) -> None:
    """Copy values to panels `[keys][columns of the panel]`, a row at a time: the next one may be on another page.

    Args:
        values: where they are.
        target: the buffer of panels.
        origin: its first float.
        sizes: vectors of a panel, and lanes of a vector.
    """
    vectors, lanes = sizes
    width, whole = vectors * lanes, T.bind(tx.truncdiv(values.width, lanes))

    def place(vector: Any, line: Any) -> Any:
        panel, column = tx.truncdiv(vector, vectors), tx.truncmod(vector, vectors)
        return T.bind(line + i64(panel) * width * i64(values.count) + i64(column * lanes))

    with T.serial(0, values.count) as key:
        begin, line = T.bind(values.first + i64(key) * values.row), T.bind(origin + i64(key) * width)
        with T.serial(0, whole) as vector:
            value = load(values.buffer, begin + i64(vector) * lanes, lanes)
            store(target, place(vector, line), value, lanes)
        with T.serial(whole * lanes, values.width) as one:
            rest = T.bind(i64(tx.bitwise_and(one, lanes - 1)))
            store(target, place(whole, line) + rest, values.buffer[begin + i64(one)], 1)
