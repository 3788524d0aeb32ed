"""Vectors and run-time choices, as a direct convolution writes them in TIR."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tx
from tvm.tirx.script import builder as T

__all__ = ["ceildiv", "choose", "cut", "int32", "join", "load", "store"]


def int32(value: int) -> Any:
    """A constant."""
    return tx.IntImm("int32", value)


def ceildiv(value: Any, by: Any) -> Any:
    """`value / by`, rounded up; neither is negative."""
    return tx.truncdiv(value + (by - 1), int32(by) if isinstance(by, int) else by)


def choose(value: Any, largest: int, body: Callable[[int], None]) -> None:
    """Write `body(n)` for every n up to the largest; the one that is `value` runs."""
    if largest == 1:
        body(1)
        return
    with T.If(tx.EQ(value, int32(largest))):
        with T.Then():
            body(largest)
        with T.Else():
            choose(value, largest - 1, body)


def load(buffer: Any, offset: Any, count: int) -> Any:
    """Successive floats: a vector, or one scalar."""
    return buffer[offset] if count == 1 else buffer[tx.Ramp(offset, 1, count)]


def store(buffer: Any, offset: Any, value: Any, count: int) -> None:
    """Write what `load` would read."""
    T.buffer_store(buffer, value, [offset if count == 1 else tx.Ramp(offset, 1, count)])


def join(parts: list[Any], run: int) -> Any:
    """One vector of several runs."""
    return parts[0] if len(parts) == 1 else tx.Shuffle(parts, list(range(len(parts) * run)))


def cut(value: Any, piece: int, run: int, lanes: int) -> Any:
    """Lanes of a vector that are one run."""
    return value if run == lanes else tx.Shuffle([value], list(range(piece * run, (piece + 1) * run)))
