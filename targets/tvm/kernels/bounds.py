"""What a kernel touches of its buffers: sums and products of constants that the reader of a plan can compute.

A kernel finds its extents in the int32 constants `shape`, and what to compute in lists that other kernels write. So
every kernel states how many elements of each buffer it reads or writes at most. The terms are entries of its constants,
facts known of its lists, and the number of threads. The kernel also states what else must hold, such as divisors that
are not zero and products that fit 32 bits. The statement is part of the library (`link.py` writes it as C text). The
reader of a plan compares the statement with every call (`runtime/bounds.c`), and so does the writer (`plan_check.py`).

Sizes are not negative; a difference ends at zero. A sum or product beyond 64 bits is no size, nor is a negative entry.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Protocol

from dvexport.targets.tvm.machine.dtype import DType

__all__ = [
    "INT32_MAX",
    "LIST_HEAD",
    "PARTS",
    "Buffer",
    "Contract",
    "Facts",
    "ListKind",
    "Made",
    "Needs",
    "Refused",
    "Size",
    "at_least",
    "c_text",
    "ceil",
    "contract_of",
    "entry",
    "evaluate",
    "fits",
    "known",
    "largest",
    "least",
    "most",
    "reads",
    "rising",
    "size",
    "uses",
    "writes",
]

INT32_MAX = (1 << 31) - 1
_LIMIT = (1 << 64) - 1


LIST_HEAD = 16
"""Elements of a list of lines or of runs before its offsets."""


class ListKind(IntEnum):
    """The form of a list, as `runtime/internal.h` numbers them."""

    NONE = 0
    CHANNELS = 1
    """[0] a count, from 1 on so many indices."""
    LINES = 2
    """[0] a count, from 16 on so many offsets."""
    RUNS = 3
    """[0] vectors, [1] a capacity C, from 16 on offsets of outputs, from 16 + C on those of inputs."""


class Refused(Exception):
    """An expression has no value: an entry is negative or not there, or a number is too large."""


@dataclass(frozen=True)
class Size:
    """An expression; made by the functions of this module and by arithmetic."""

    op: str
    args: tuple[Size, ...] = ()
    value: int = 0
    name: str = ""

    def __add__(self, other: Size | int) -> Size:
        """Return the sum."""
        return Size("add", (self, size(other)))

    def __radd__(self, other: int) -> Size:
        """Return the sum."""
        return size(other) + self

    def __sub__(self, other: Size | int) -> Size:
        """Return the difference, at least 0."""
        return Size("sub", (self, size(other)))

    def __mul__(self, other: Size | int) -> Size:
        """Return the product."""
        return Size("mul", (self, size(other)))

    def __rmul__(self, other: int) -> Size:
        """Return the product."""
        return size(other) * self

    def __floordiv__(self, other: Size | int) -> Size:
        """Return the quotient, rounded down; by zero it is refused."""
        return Size("div", (self, size(other)))


Needs = tuple[tuple[Size, Size], ...]
"""Pairs of expressions of which the first may not exceed the second."""

PARTS = Size("parts")
"""The most threads that may share a call."""


def size(value: Size | int) -> Size:
    """Return a number as an expression."""
    return Size("const", value=int(value)) if isinstance(value, int) else value


def entry(index: Size | int, buffer: str = "shape") -> Size:
    """Return an int32 of a constant buffer."""
    return Size("entry", (size(index),), name=buffer)


def largest(first: Size | int, count: Size | int, step: int = 1, buffer: str = "shape") -> Size:
    """Return the largest of `count` entries from `first` on, `step` apart; 0 of none. None may be negative."""
    return Size("largest", (size(first), size(count), size(step)), name=buffer)


def rising(first: Size | int, count: Size | int, buffer: str = "shape") -> Size:
    """Return the last of `count` entries from `first` on, which are not negative and never fall."""
    return Size("rising", (size(first), size(count)), name=buffer)


def known(buffer: str, what: str) -> Size:
    """Return what is known of a list.

    Args:
        buffer: the list.
        what: `count`, the most items it may have, of `RUNS` vectors; `limit`, 1 more than the largest item, of `RUNS`
            of the outputs; `inputs`, of `RUNS` the same of the inputs.
    """
    assert what in ("count", "limit", "inputs")
    return Size(what, name=buffer)


def ceil(value: Size | int, by: Size | int) -> Size:
    """Return a quotient, rounded up."""
    return (size(value) + (size(by) - 1)) // by


def most(*values: Size | int) -> Size:
    """Return the largest of some expressions."""
    first, *rest = map(size, values)
    for each in rest:
        first = Size("max", (first, each))
    return first


def least(*values: Size | int) -> Size:
    """Return the smallest of some expressions."""
    first, *rest = map(size, values)
    for each in rest:
        first = Size("min", (first, each))
    return first


@dataclass(frozen=True)
class Buffer:
    """What a kernel does with a buffer.

    Attributes:
        elements: how many it reads or writes at most, from the first on.
        written: whether it writes it.
        over: names of the buffers that it may be, if it is written; it must not overlap others.
        reads: the kind of list that it is read as; NONE: its content decides no address.
        pieces: items of a vector of a list of `RUNS`.
        scattered: it may start at any element; else it starts on 64 bytes.
        dtype: the type of an element; `contract_of` knows it.
    """

    elements: Size
    written: bool = False
    over: tuple[str, ...] = ()
    reads: ListKind = ListKind.NONE
    pieces: int = 0
    scattered: bool = False
    dtype: DType | None = None

    @property
    def bytes(self) -> int:
        """Bytes of an element."""
        assert self.dtype is not None, self
        return self.dtype.bytes


@dataclass(frozen=True)
class Made:
    """A list that a kernel writes: what holds of it, as `known` has it; `pieces` as in `Buffer`, at least."""

    buffer: str
    kind: ListKind
    count: Size
    limit: Size
    inputs: Size = field(default_factory=lambda: size(0))
    pieces: Size = field(default_factory=lambda: size(0))


@dataclass(frozen=True)
class Contract:
    """All that a kernel states.

    Attributes:
        buffers: by name, in the order of the kernel's.
        needs: pairs of expressions of which the first may not exceed the second.
        makes: lists that it writes.
    """

    buffers: tuple[tuple[str, Buffer], ...]
    needs: tuple[tuple[Size, Size], ...] = ()
    makes: tuple[Made, ...] = ()


def reads(elements: Size | int, *, scattered: bool = False) -> Buffer:
    """Return a buffer that is read."""
    return Buffer(size(elements), scattered=scattered)


def writes(elements: Size | int, *, over: tuple[str, ...] = ()) -> Buffer:
    """Return a buffer that is written, and perhaps read as well."""
    return Buffer(size(elements), True, over)


def uses(kind: ListKind, pieces: int = 0) -> Buffer:
    """Return a list that is read: whoever wrote it stated how large it is."""
    return Buffer(size(0), reads=kind, pieces=pieces)


def fits(*values: Size) -> Needs:
    """Return the needs that numbers of a kernel fit 32 bits."""
    return tuple((value, size(INT32_MAX)) for value in values)


def at_least(minimum: int, *values: Size) -> Needs:
    """Return the needs that numbers of a kernel are not less than one."""
    return tuple((size(minimum), value) for value in values)


def contract_of(
    types: Mapping[str, DType], buffers: Mapping[str, Buffer], *needs: Needs, makes: tuple[Made, ...] = ()
) -> Contract:
    """Return a contract.

    Args:
        types: element type of every buffer, in the order of the kernel's.
        buffers: what it does with each.
        needs: as `fits` and `at_least` return them.
        makes: lists that it writes.
    """
    assert set(types) == set(buffers), (types, buffers)
    stated = tuple((name, replace(buffers[name], dtype=dtype)) for name, dtype in types.items())
    return Contract(stated, tuple(pair for group in needs for pair in group), makes)


class Facts(Protocol):
    """What an expression is about."""

    parts: int

    def entries(self, buffer: str, first: int, count: int, step: int) -> list[int]:
        """Return entries of a constant; raises Refused where it has not so many."""

    def of_list(self, buffer: str, what: str) -> int:
        """Return what is known of a list."""


def evaluate(expr: Size, facts: Facts) -> int:
    """Return the value of an expression.

    Raises:
        Refused: it has none.
    """
    if expr.op == "const":
        return expr.value
    if expr.op == "parts":
        return facts.parts
    if expr.op in ("count", "limit", "inputs"):
        return facts.of_list(expr.name, expr.op)
    args = [evaluate(each, facts) for each in expr.args]
    if expr.op in ("entry", "largest", "rising"):
        return _of_entries(expr, args, facts)
    a, b = args
    if expr.op == "div" and b == 0:
        raise Refused("a divisor is zero")
    made = {
        "add": lambda: a + b, "sub": lambda: max(a - b, 0), "mul": lambda: a * b, "div": lambda: a // b,
        "max": lambda: max(a, b), "min": lambda: min(a, b),
    }[expr.op]()  # fmt: skip
    if made > _LIMIT:
        raise Refused("a size is too large")
    return made


def _of_entries(expr: Size, args: list[int], facts: Facts) -> int:
    first, count, step = (*args, 1, 1)[:3] if expr.op == "entry" else (*args, 1)[:3]
    values = facts.entries(expr.name, first, count, step)
    if any(value < 0 for value in values):
        raise Refused(f"an entry of {expr.name} is negative")
    if expr.op == "rising":
        if any(after < before for before, after in itertools.pairwise(values)):
            raise Refused(f"entries of {expr.name} fall")
        return values[-1] if values else 0
    return max(values, default=0)


def c_text(expr: Size, numbers: Mapping[str, int]) -> str:
    """Return an expression as C text for `runtime/bounds.c`; `numbers`: those of the buffers, by name."""
    if expr.op == "const":
        return f"{expr.value}u"
    if expr.op == "parts":
        return "dvx_parts(b)"
    if expr.op in ("count", "limit", "inputs"):
        return f"dvx_list_{expr.op}(b, {numbers[expr.name]})"
    args = [c_text(each, numbers) for each in expr.args]
    buffer = [str(numbers[expr.name])] if expr.name else []
    return f"dvx_{expr.op}(b, {', '.join([*buffer, *args])})"
