"""The plan: what the C runtime executes, a straight list of kernel calls over memory placed at export.

A call may have several alternatives; the runtime takes the cheapest. `plan_file.py` has the bytes of a shipped plan.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum

__all__ = ["COST_TERMS", "DTYPES", "Alternative", "Call", "Derivation", "Place", "Plan", "Port", "Space"]

COST_TERMS = 10

DTYPES = ("float32", "int64", "int32", "bool")
"""Element types of ports, by their number in the file."""


class Space(IntEnum):
    """Where a place is.

    `BEFORE` and `AFTER` are the halves of the flip space: what the previous step wrote and what this one
    writes. They change places after every step, so a state that is rewritten whole is never copied. `DERIVED` holds
    weights that are made of others when a plan is opened.
    """

    WEIGHTS = 0
    ARENA = 1
    STATE = 2
    BEFORE = 3
    AFTER = 4
    DERIVED = 5


@dataclass(frozen=True)
class Place:
    """Some bytes of a space; `offset` is a multiple of 64 unless it is a slice of a larger buffer."""

    space: Space
    offset: int
    size: int

    def packed(self) -> bytes:
        """Return the 16 bytes of the file."""
        return struct.pack("<QQ", self.space << 56 | self.offset, self.size)


@dataclass(frozen=True)
class Port:
    """An input or output."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class Alternative:
    """A kernel with its arguments and its cost model in nanoseconds (zeros: unknown).

    Attributes:
        only: vectors of pixels that it is for; 0: any number. The first alternative of a call is for any.
    """

    kernel: str
    arguments: tuple[Place, ...]
    cost: tuple[float, ...] = (0.0,) * COST_TERMS
    only: int = 0


@dataclass(frozen=True)
class Call:
    """One step of the list.

    Attributes:
        alternatives: ways to do it; one or more.
        counts: lists of output channels, input channels and vectors that its work is proportional to.
        label: the node it is made from.
        gate: the gate it belongs to, or nothing.
    """

    alternatives: tuple[Alternative, ...]
    label: str
    gate: str = ""
    counts: tuple[Place | None, Place | None, Place | None] = (None, None, None)


@dataclass(frozen=True)
class Derivation:
    """Weights that are made of others when a plan is opened, and so are in no file.

        target[o, p, q, c] = sum over k, l of matrix[p, k] * source[o, c, k, l] * matrix[q, l]

    Attributes:
        source, target: float32, each output's `source_row` and `target_row` elements after the one before.
        matrix: float64 `[points, edge]`.
        points, edge: the range of p and q, and of k and l.
        outputs, inputs: the range of o, and of c.
    """

    source: Place
    matrix: Place
    target: Place
    points: int
    edge: int
    outputs: int
    inputs: int
    source_row: int
    target_row: int


@dataclass
class Plan:
    """What one step does.

    Attributes:
        arena, state, flip: bytes of working memory, of states kept in place, and of one half of the states
            that are rewritten whole.
        derived: bytes of the weights that `derivations` make.
        threads: the most that may share a step: each has scratch memory of its own in the arena. 1 to `MOST_THREADS`.
    """

    inputs: list[Port]
    outputs: list[Port]
    calls: list[Call]
    arena: int = 0
    state: int = 0
    flip: int = 0
    threads: int = 1
    derived: int = 0
    derivations: list[Derivation] = field(default_factory=list)

    @property
    def memory(self) -> int:
        """Bytes that a running instance allocates, weights left out."""
        return self.arena + self.state + 2 * self.flip

    @property
    def kernels(self) -> list[str]:
        """Names of the kernels called, sorted."""
        return sorted({alternative.kernel for call in self.calls for alternative in call.alternatives})
