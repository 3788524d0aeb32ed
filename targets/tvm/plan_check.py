"""Whether the calls of a plan stay inside what they are given: what `runtime/bounds.c` checks when a plan is opened.

Calls are gone through in order. What is known of a list is what the kernel stated that wrote it, until something is
written over it; of a constant one, what it holds. With that and the constants, what each kernel touches is a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

from dvexport.targets.tvm.kernels.bounds import Buffer, Contract, ListKind, Made, Refused, evaluate
from dvexport.targets.tvm.machine.dtype import LINE_BYTES, S32
from dvexport.targets.tvm.plan import Alternative, Call, Place, Plan, Space

__all__ = ["List", "check_calls", "constant_list"]

_ALIGN = LINE_BYTES
_INT_BYTES = S32.bytes
_HEADERS = {ListKind.CHANNELS: 1, ListKind.LINES: 16, ListKind.RUNS: 16}
"""Elements of a list before its items."""


@dataclass(frozen=True)
class List:
    """What is known of a list; see `bounds.known` and `bounds.Made`."""

    kind: ListKind
    count: int
    limit: int
    inputs: int
    pieces: int


def constant_list(data: np.ndarray, buffer: Buffer) -> List:
    """Return what is known of a list in the weights (int32), by what it holds.

    Raises:
        Refused: it is longer than what holds it, or has a negative item.
    """
    header = _HEADERS[buffer.reads]
    if data.size < header or data[0] < 0:
        raise Refused("a list has no count")
    count = int(data[0])
    pieces = buffer.pieces if buffer.reads is ListKind.RUNS else 1
    capacity = int(data[1]) if buffer.reads is ListKind.RUNS else count
    columns = 2 if buffer.reads is ListKind.RUNS else 1
    items = count * pieces
    if items > capacity or header + capacity * (columns - 1) + items > data.size:
        raise Refused("a list is longer than its place")
    limits = [0, 0]
    for column in range(columns):
        part = data[header + column * capacity :][:items]
        if part.size and part.min() < 0:
            raise Refused("a list has a negative item")
        limits[column] = int(part.max(initial=-1)) + 1
    return List(buffer.reads, count, limits[0], limits[1], pieces)


@dataclass
class _Call:
    """What expressions of a alternative are about (`bounds.Facts`)."""

    numbers: Mapping[str, int]
    arguments: tuple[Place, ...]
    weights: np.ndarray
    lists: Mapping[str, List]
    parts: int

    def entries(self, buffer: str, first: int, count: int, step: int) -> list[int]:
        place = self.arguments[self.numbers[buffer]]
        if place.space is not Space.WEIGHTS:
            raise Refused(f"{buffer} is no constant")
        if count and (first + (count - 1) * step + 1) * _INT_BYTES > place.size:
            raise Refused(f"{buffer} is too short")
        data = _ints(self.weights, place)
        return [int(value) for value in data[first : first + (count - 1) * step + 1 : step]] if count else []

    def of_list(self, buffer: str, what: str) -> int:
        return int(getattr(self.lists[buffer], what))


def check_calls(
    plan: Plan, contracts: Mapping[str, Contract], weights: bytes | memoryview, parts: int
) -> list[tuple[int, ...]]:
    """Check that every call of a plan stays inside its arguments.

    Args:
        plan: what is called.
        contracts: what its kernels state, by name.
        weights: the weights file.
        parts: the most threads that may share a call.

    Returns:
        The bytes that are touched of each argument; a list for every alternative, in order.

    Raises:
        AssertionError: one does not; names the call, the kernel and the buffer.
    """
    data, lists = np.frombuffer(weights, np.uint8), dict[Place, List]()
    touched = list[tuple[int, ...]]()
    for call in plan.calls:
        found = [
            _check_alternative(call, each, contracts[each.kernel], data, lists, parts) for each in call.alternatives
        ]
        touched += [sizes for sizes, _ in found]
        written = [
            place
            for alternative in call.alternatives
            for place, (_, buffer) in zip(alternative.arguments, contracts[alternative.kernel].buffers, strict=True)
            if buffer.written
        ]
        lists = {place: known for place, known in lists.items() if not any(_overlap(place, each) for each in written)}
        if len(found) == 1 and not any(call.counts):  # such a call is never skipped
            lists |= found[0][1]
    return touched


def _check_alternative(
    call: Call, alternative: Alternative, stated: Contract, weights: np.ndarray, lists: Mapping[Place, List], parts: int
) -> tuple[tuple[int, ...], dict[Place, List]]:
    """Check a alternative; return the bytes that it touches of each argument, and the lists that it makes."""
    buffers = list(zip(alternative.arguments, stated.buffers, strict=True))
    try:
        known = {name: _list(place, buffer, weights, lists) for place, (name, buffer) in buffers if buffer.reads}
        numbers = {name: index for index, (name, _) in enumerate(stated.buffers)}
        facts, touched = _Call(numbers, alternative.arguments, weights, known, parts), list[int]()
        for place, (name, buffer) in buffers:
            _check_place(place, name, buffer)
            touched.append(evaluate(buffer.elements, facts) * buffer.bytes)
            if touched[-1] > place.size:
                raise Refused(f"{touched[-1]} bytes of {name} are touched, it has {place.size}")
        for less, more in stated.needs:
            if evaluate(less, facts) > evaluate(more, facts):
                raise Refused(f"a number is out of range: {less} > {more}")
        _check_apart(buffers)
        made = {alternative.arguments[numbers[each.buffer]]: _made(each, facts) for each in stated.makes}
        return tuple(touched), made
    except Refused as refused:
        raise AssertionError(f"{call.label}: {alternative.kernel}: {refused}") from refused


def _check_place(place: Place, name: str, buffer: Buffer) -> None:
    if place.offset % (buffer.bytes if buffer.scattered else _ALIGN):
        raise Refused(f"{name} is not aligned")
    if buffer.written and place.space in (Space.WEIGHTS, Space.DERIVED):
        raise Refused(f"{name} is written and lies in the weights")


def _check_apart(buffers: list[tuple[Place, tuple[str, Buffer]]]) -> None:
    """Check that what is written overlaps nothing else, but where a kernel may work in place."""
    for (place, (name, buffer)), (other, (other_name, _)) in product(buffers, buffers):
        if not buffer.written or name == other_name or not _overlap(place, other):
            continue
        if other_name not in buffer.over or place.offset != other.offset:
            raise Refused(f"{name} overlaps {other_name}")


def _list(place: Place, buffer: Buffer, weights: np.ndarray, lists: Mapping[Place, List]) -> List:
    if place.space is Space.WEIGHTS:
        return constant_list(_ints(weights, place), buffer)
    known = lists.get(place)
    if known is None or known.kind is not buffer.reads or known.pieces < buffer.pieces:
        raise Refused("a list is read that nothing has written")
    return known


def _made(made: Made, facts: _Call) -> List:
    count, limit, inputs, pieces = (
        evaluate(each, facts) for each in (made.count, made.limit, made.inputs, made.pieces)
    )
    return List(made.kind, count, limit, inputs, pieces)


def _ints(weights: np.ndarray, place: Place) -> np.ndarray:
    return weights[place.offset :][: place.size // _INT_BYTES * _INT_BYTES].view(np.int32)


def _overlap(a: Place, b: Place) -> bool:
    return a.space is b.space and a.offset < b.offset + b.size and b.offset < a.offset + a.size
