"""Vectors in TIR: reading, writing and repeating elements, choices at run time, and ways to cover the rows of planes.

Two ways to cover a row of `n` floats, neither of which reads or writes outside of it:

- `cover`: the last vector is moved back to end with the row, so a few floats are handled twice. Rows shorter
  than a vector take a narrower one. Not for a buffer that is changed in place.
- `blocks` of whole vectors, where a size is a multiple of a cache line by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.abi import Frame, share
from dvexport.targets.tvm.kernels.bounds import PARTS, Needs, Size, ceil, fits, size
from dvexport.targets.tvm.machine.dtype import BF16, S32, DType

__all__ = [
    "ceil_div",
    "choose",
    "constant",
    "cover",
    "cover_blocks",
    "cut",
    "int32",
    "join",
    "keep_inside",
    "load",
    "narrower",
    "register",
    "row_spans",
    "spans_fit",
    "splat",
    "store",
    "strided",
]


def int32(value: int) -> Any:
    """Return a constant."""
    return tx.IntImm(S32.tvm, value)


def load(buffer: Any, at: Any, lanes: int) -> Any:
    """Read `lanes` neighbouring elements, whatever their alignment."""
    return buffer[at] if lanes == 1 else buffer[tx.Ramp(at, 1, lanes)]


def store(buffer: Any, at: Any, value: Any, lanes: int) -> None:
    """Write `lanes` neighbouring elements, whatever their alignment."""
    T.buffer_store(buffer, value, [at if lanes == 1 else tx.Ramp(at, 1, lanes)])


def splat(value: Any, lanes: int) -> Any:
    """Repeat a value in every lane."""
    return value if lanes == 1 else tx.Broadcast(value, lanes)


def constant(value: float, dtype: DType, lanes: int = 1) -> Any:
    """Return a number in every lane."""
    is_integer = dtype.array.kind in "iu" and dtype is not BF16
    return splat(tx.IntImm(dtype.tvm, int(value)) if is_integer else tx.FloatImm(dtype.tvm, value), lanes)


def register(dtype: DType, lanes: int) -> Any:
    """Return a vector that changes, such as a sum: LLVM keeps it in a register."""
    return T.alloc_buffer((lanes,), dtype.tvm, scope="global")


def join(parts: list[Any], run: int) -> Any:
    """Return one vector of several runs."""
    return parts[0] if len(parts) == 1 else tx.Shuffle(parts, list(range(len(parts) * run)))


def cut(value: Any, piece: int, run: int, lanes: int) -> Any:
    """Return the lanes of a vector that are one run."""
    return value if run == lanes else tx.Shuffle([value], list(range(piece * run, (piece + 1) * run)))


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


def strided(read: Callable[[int], Any], tap: int, step: int, lanes: int) -> Any:
    """Return elements `tap`, `tap + step`, ... of what `read(offset)` reads `lanes` neighbours of.

    Where `step` is 2, every other element of two neighbouring vectors, moved along by a third for taps beyond the
    first two. `read` is asked for the same few offsets by all taps then, so a caller should remember its reads.
    """
    if lanes == 1 or step == 1:
        return read(tap)
    assert step == 2, step
    parity, moved = tap % 2, tap // 2
    apart = tx.Shuffle([read(0), read(lanes)], list(range(parity, 2 * lanes, 2)))
    if moved == 0:
        return apart
    if 2 * moved > lanes:
        return tx.Shuffle([read(2 * moved), read(2 * moved + lanes)], list(range(parity, 2 * lanes, 2)))
    entering = [lanes + parity + 2 * lane for lane in range(moved)]
    return tx.Shuffle([T.bind(apart), read(2 * lanes)], [*range(moved, lanes), *entering])


def ceil_div(count: Any, size: Any) -> Any:
    """Return the number of blocks of `size` that hold `count` items; neither is negative."""
    return tx.truncdiv(count + (size - 1), int32(size) if isinstance(size, int) else size)


def narrower(lanes: int) -> list[int]:
    """Return the vector lengths that rows are covered with: `lanes`, its halves down to 4, and 1."""
    return [*(width for width in (16, 8, 4) if width <= lanes), 1]


def cover(length: Any, lanes: int, body: Callable[[Callable[[Any], Any], Any, int], None]) -> None:
    """Write `body` once for each vector length that a row of `length` elements may need.

    Args:
        length: elements of the row, at run time.
        lanes: the machine's lanes.
        body: called with (place, count, width): vector v of `count` is `width` elements from `place(v)`.
    """
    _cover(length, narrower(lanes), body)


def _cover(length: Any, widths: list[int], body: Callable[[Callable[[Any], Any], Any, int], None]) -> None:
    width, *rest = widths
    if not rest:
        body(
            lambda index: index & 3, length, width
        )  # under 4 of them; the mask hides a loop that LLVM would call memcpy for
        return
    with T.If(length >= width):
        with T.Then():
            body(lambda index: tx.min(index * width, length - width), ceil_div(length, width), width)
        with T.Else():
            _cover(length, rest, body)


def cover_blocks(length: Size, lanes: int) -> Size:
    """Return the most vectors that `cover` cuts a row into."""
    return ceil(length, lanes) + 3


def spans_fit(rows: Size | int, length: Size) -> Needs:
    """Return what `row_spans` and `share` need of rows x items."""
    return fits(size(rows) * length * PARTS + length)


@contextmanager
def row_spans(frame: Frame, rows: Any, length: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Loop over this thread's share of `rows` x `length` items; sharing cuts rows where it must.

    Yields:
        The row, and the range of its items that is this thread's.
    """
    low, high = share(rows * length, frame.part, frame.parts)
    span = T.bind(tx.max(length, int32(1)))
    with T.serial(tx.truncdiv(low, span), tx.truncdiv(high + (span - 1), span)) as row:
        start = T.bind(row * span)
        yield row, T.bind(tx.max(low - start, int32(0))), T.bind(tx.min(high - start, span))


def keep_inside(value: Any, inside: Any, dtype: DType, lanes: int) -> Any:
    """Return a vector with zeros where `inside` has them, whatever it has there."""
    zero = constant(0.0, dtype, lanes)
    return tx.Select(tx.EQ(inside, zero), zero, value)
