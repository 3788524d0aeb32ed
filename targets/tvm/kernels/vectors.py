"""Vectors over plane rows: what the kernels that move and pool planes have in common.

Two ways to cover a row of `n` floats, neither of which reads or writes outside of it:

- `cover`: the last vector is moved back to end with the row, so a few floats are handled twice. Rows shorter
  than a vector take a narrower one. Not for a buffer that is changed in place.
- `blocks` of whole vectors, where a size is a multiple of 16 by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.abi import Frame, i64, share
from dvexport.targets.tvm.kernels.bounds import PARTS, Needs, Size, at_least, ceil, entry, fits, most, size

__all__ = [
    "LINE",
    "ceil_div",
    "cover",
    "cover_blocks",
    "keep_inside",
    "load",
    "narrower",
    "padded_planes",
    "pads_fit",
    "row_spans",
    "spans_fit",
    "splat",
    "store",
    "strided",
    "zero_around",
    "zero_outside",
]

LINE = 16
"""Floats in 64 bytes, which sizes and bases of planes are multiples of (`layout.Plane`)."""


def load(buffer: Any, at: Any, lanes: int) -> Any:
    """Read `lanes` neighbouring elements, whatever their alignment."""
    return buffer[at] if lanes == 1 else buffer[tx.Ramp(at, tx.IntImm("int64", 1), lanes)]


def store(buffer: Any, at: Any, value: Any, lanes: int) -> None:
    """Write `lanes` neighbouring elements, whatever their alignment."""
    T.buffer_store(buffer, value, [at if lanes == 1 else tx.Ramp(at, tx.IntImm("int64", 1), lanes)])


def splat(value: Any, lanes: int) -> Any:
    """Repeat a float in every lane."""
    scalar = tx.FloatImm("float32", value) if isinstance(value, float) else value
    return scalar if lanes == 1 else tx.Broadcast(scalar, lanes)


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


def ceil_div(count: Any, size: int) -> Any:
    """Return the number of blocks of `size` that hold `count` items."""
    return tx.truncdiv(count + (size - 1), size)


def narrower(lanes: int) -> list[int]:
    """Return the vector lengths that rows are covered with: `lanes`, its halves down to 4, and 1."""
    return [*(width for width in (16, 8, 4) if width <= lanes), 1]


def cover(length: Any, lanes: int, body: Callable[[Callable[[Any], Any], Any, int], None]) -> None:
    """Write `body` once for each vector length that a row of `length` elements may need.

    Args:
        length: elements of the row, at run time.
        lanes: of the machine.
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
    span = T.bind(tx.max(length, tx.IntImm("int32", 1)))
    with T.serial(tx.truncdiv(low, span), tx.truncdiv(high + (span - 1), span)) as row:
        start = T.bind(row * span)
        yield row, T.bind(tx.max(low - start, tx.IntImm("int32", 0))), T.bind(tx.min(high - start, span))


def keep_inside(value: Any, inside: Any, lanes: int) -> Any:
    """Return a vector with zeros where `inside` has them, whatever it has there."""
    zero = splat(0.0, lanes)
    return tx.Select(tx.EQ(inside, zero), zero, value)


def zero_outside(buffer: Any, plane: Any, sizes: tuple[Any, Any, Any], lanes: int) -> None:
    """Zero a plane before `base` and from `end` on.

    Args:
        buffer: of planes.
        plane: int64 offset of the plane.
        sizes: int32 base, end and size; a vector fits before the one and after the other.
        lanes: of the machine; it divides base and size.
    """
    base, end, size = sizes
    zero = splat(0.0, lanes)
    with T.serial(0, tx.truncdiv(base, lanes)) as index:
        store(buffer, plane + i64(tx.min(index * lanes, base - lanes)), zero, lanes)  # min: no call of memset
    with T.serial(0, ceil_div(size - end, lanes)) as index:
        store(buffer, plane + i64(tx.min(end + index * lanes, size - lanes)), zero, lanes)


def padded_planes() -> Size:
    """Return the floats of planes that `zero_around` and rows of images write.

    The entries of `shape` are those of `planes.frame_shape`: C, H, W, pitch, base, end of the rows, size.
    """
    channels, height, width, pitch, base, _, plane = map(entry, range(7))
    return (channels - 1) * plane + most(plane, base + height * pitch, base + (height - 1) * pitch + width)


def pads_fit(lanes: int) -> Needs:
    """Return what `padded_planes` needs to be all that is written."""
    channels, height, width, pitch, base, end, plane = map(entry, range(7))
    return (
        *at_least(lanes, plane),
        *fits(base + height * pitch + width + lanes, channels * (height + 1) * PARTS, plane + lanes, end + lanes),
    )


def zero_around(buffer: Any, plane: Any, sizes: tuple[Any, ...], lanes: int) -> None:
    """Zero a plane but for its image.

    Args:
        buffer: of planes.
        plane: int64 offset of the plane.
        sizes: int32 height, width, pitch, base, end of the rows and size, as in `layout.Plane`.
        lanes: of the machine; it divides base and size.
    """
    height, width, pitch, base, end, size = sizes
    zero_outside(buffer, plane, (base, end, size), lanes)
    with T.serial(width, pitch) as column:  # 1 to 3 of them
        first = T.bind(plane + i64(base + column))
        with T.serial(0, height) as row:
            store(buffer, first + i64(row * pitch), splat(0.0, 1), 1)
