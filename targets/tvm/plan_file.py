"""The bytes that a plan is shipped as.

A step is a straight list of kernel calls over memory placed at export. `runtime/dvx.c` reads this format;
both sides check it. All numbers are little-endian, every table starts at a multiple of 8.

    header    136 bytes: see `_HEADER`
    ports     inputs, then outputs          name u32, type u32, rank u32, 0 u32, place, 6 x i64 sizes
    calls     in the order of execution     first alternative u32, alternatives u32, label u32, gate u32, 3 x place
    alternatives  ways to do a call             kernel u32, first argument u32, arguments u32, only u32, 10 x f32 cost
    arguments                               place
    derivations  weights to make at opening     source, matrix and target place, points u32, edge u32, outputs u32,
                                            inputs u32, source row u64, target row u64
    strings   NUL-terminated UTF-8; names, labels and gates are offsets into it

A *place* is u64 (space << 56 | offset) and u64 bytes; all ones: none. The three places of a call are
int32 lists whose first element is a count: output channels, input channels, vectors of pixels. A call without output
channels or without pixels is skipped; without input channels it still writes the bias. A call does the
alternative of least cost. A cost is in nanoseconds on one thread; a missing count is 1. It is the first eight
coefficients times (1, a, b, c, ab, ac, bc, abc), plus a times the lesser of the tenth and of b times the ninth.
An alternative with an `only` other than 0 fits exactly so many vectors; the first fits any.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dvexport.targets.runtime import MOST_THREADS
from dvexport.targets.tvm.plan import COST_TERMS, DTYPES, Derivation, Place, Plan, Port
from dvexport.targets.tvm.plan_check import check_calls

if TYPE_CHECKING:
    from dvexport.targets.tvm.build.link import Entry

__all__ = ["HEADER_BYTES", "MAX_RANK", "VERSION", "plan_bytes", "read_limit"]

MAGIC = b"DVXPLAN\0"
VERSION = 4
MAX_RANK = 6

_HEADER = struct.Struct("<8sIIQIIQQQQQ32s8I")
"""Magic, version, header bytes, plan bytes, CRC-32 of what follows the header, CRC-32 of the weights,
bytes of weights, of derived ones, of arena, state and one half of the flip space, SHA-256 of the library, numbers of
inputs, outputs, calls, alternatives, arguments, derivations, bytes of strings, the most threads of a step."""

HEADER_BYTES = _HEADER.size

_NONE = (1 << 64) - 1


def plan_bytes(plan: Plan, table: Sequence[Entry], library: bytes, weights: bytes | memoryview) -> bytes:
    """Return the file of a plan.

    Args:
        plan: what to write.
        table: the library's kernel table.
        library: SHA-256 that the library was built with (32 bytes).
        weights: the weights file.

    Raises:
        AssertionError: a call touches more than it is given: its kernel states too much, or a buffer is too small.
    """
    assert 1 <= plan.threads <= MOST_THREADS, plan.threads
    check_calls(plan, {entry.name: entry.contract for entry in table}, weights, plan.threads)
    strings, index = _Strings(), {entry.name: i for i, entry in enumerate(table)}
    ports = b"".join(_port(port, strings) for port in (*plan.inputs, *plan.outputs))
    calls, alternatives, arguments = bytearray(), bytearray(), bytearray()
    alternative_count = argument_count = 0
    for call in plan.calls:
        counts = b"".join(_optional(place) for place in call.counts)
        head = (alternative_count, len(call.alternatives), strings.add(call.label), strings.add(call.gate))
        calls += struct.pack("<4I", *head) + counts
        for alternative in call.alternatives:
            head = (index[alternative.kernel], argument_count, len(alternative.arguments), alternative.only)
            alternatives += struct.pack(f"<4I{COST_TERMS}f", *head, *alternative.cost)
            arguments += b"".join(place.packed() for place in alternative.arguments)
            argument_count += len(alternative.arguments)
        alternative_count += len(call.alternatives)
    text = strings.bytes()
    body = ports + calls + alternatives + arguments + b"".join(map(_derivation, plan.derivations)) + text
    header = _HEADER.pack(
        MAGIC, VERSION, HEADER_BYTES, HEADER_BYTES + len(body), zlib.crc32(body), zlib.crc32(weights),
        len(weights), plan.derived, plan.arena, plan.state, plan.flip, library,
        len(plan.inputs), len(plan.outputs), len(plan.calls), alternative_count, argument_count,
        len(plan.derivations), len(text), plan.threads,
    )  # fmt: skip
    return header + body


def read_limit(data: bytes) -> tuple[int, int] | None:
    """Return the format version of a plan's file, and how many threads it is laid out for; None if it is no plan.

    The second number means something in version `VERSION` only. Nothing else is checked: the C runtime does that.
    """
    if len(data) < HEADER_BYTES or not data.startswith(MAGIC):
        return None
    header = _HEADER.unpack_from(data)
    return header[1], header[-1]


class _Strings:
    """The string table: each text once, the empty one at 0."""

    def __init__(self) -> None:
        self._offsets = {"": 0}
        self._data = bytearray(b"\0")

    def add(self, text: str) -> int:
        if text not in self._offsets:
            self._offsets[text] = len(self._data)
            self._data += text.encode() + b"\0"
        return self._offsets[text]

    def bytes(self) -> bytes:
        return bytes(self._data) + b"\0" * (-len(self._data) % 8)


def _port(port: Port, strings: _Strings) -> bytes:
    assert len(port.shape) <= MAX_RANK, port
    sizes = (*port.shape, *[0] * (MAX_RANK - len(port.shape)))
    head = struct.pack("<4I", strings.add(port.name), DTYPES.index(port.dtype), len(port.shape), 0)
    return head + port.place.packed() + struct.pack(f"<{MAX_RANK}q", *sizes)


def _derivation(one: Derivation) -> bytes:
    places = b"".join(place.packed() for place in (one.source, one.matrix, one.target))
    numbers = (one.points, one.edge, one.outputs, one.inputs, one.source_row, one.target_row)
    return places + struct.pack("<4I2Q", *numbers)


def _optional(place: Place | None) -> bytes:
    return struct.pack("<QQ", _NONE, _NONE) if place is None else place.packed()
