"""Buffers of a step and where they lie: everything is placed at export, nothing is allocated in a step.

A buffer of the arena lives from the first call that names it to the last. Buffers whose lives overlap lie apart,
others share bytes. Largest first, each at the lowest offset that is free for all of its life.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dvexport.graph.weights import SMALLEST, Place, digest, panels_of, pitch_of
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.machine.dtype import F32, LINE_BYTES, DType
from dvexport.targets.tvm.native_files import NATIVE_WEIGHTS
from dvexport.targets.tvm.plan import Place as PlanPlace
from dvexport.targets.tvm.plan import Space

__all__ = [
    "FLOAT_BYTES",
    "Buffer",
    "Constants",
    "Part",
    "Placement",
    "Recipe",
    "lower_bound",
    "place_buffers",
    "scratch",
]

FLOAT_BYTES = F32.bytes

_ALIGN = LINE_BYTES


@dataclass(eq=False)
class Buffer:
    """Bytes that calls read and write.

    Attributes:
        name: for messages.
        size: bytes.
        space: where it lies.
        before: for a buffer in `Space.AFTER`, the one that holds the same state of the step before.
        layout: how its planes lie, if their padding is zero at every use.
        fragile: its padding has to be zero before the first use: kernels write no more than the images.
        covered: kernels write the padding between rows too; for a fragile buffer.
        dtype: the type of its elements, where all have the same.
    """

    name: str
    size: int
    space: Space = Space.ARENA
    before: Buffer | None = None
    layout: Plane | None = None
    fragile: bool = False
    covered: bool = False
    dtype: DType | None = None

    def part(self, offset: int = 0, size: int | None = None) -> Part:
        """Return some of its bytes; all of them by default."""
        return Part(self, offset, self.size - offset if size is None else size)


@dataclass(frozen=True)
class Part:
    """Some bytes of a buffer."""

    buffer: Buffer
    offset: int
    size: int

    def part(self, offset: int, size: int) -> Part:
        """Return some of these bytes."""
        return Part(self.buffer, self.offset + offset, size)

    def frame(self, frames: int, index: int) -> Part:
        """Return frame `index` of `frames` equal ones."""
        size = self.size // frames
        return self.part(index * size, size)


def scratch(floats: int) -> Part:
    """Return memory that one call uses."""
    return Buffer("scratch", max(floats, 1) * FLOAT_BYTES).part()


@dataclass(frozen=True)
class Recipe:
    """How weights are made of others when a plan is opened; see `plan.Derivation`."""

    source: Part
    matrix: Part
    points: int
    edge: int
    outputs: int
    inputs: int
    source_row: int
    target_row: int


class Constants:
    """The weights file being made: equal arrays once, each on 64 bytes, in the order they were added.

    Attributes:
        held: where graphs find weights of theirs in it, by digest (`dvexport.graph.weights`).
        recipes: of the weights that are in no file, by their buffer.
    """

    def __init__(self) -> None:
        self.held: dict[str, Place] = {}
        self.recipes: dict[Buffer, Recipe] = {}
        self._made: dict[Recipe, Buffer] = {}
        self._data: list[bytes] = []
        self._size = 0
        self._places: dict[bytes, Buffer] = {}
        self._offsets: dict[Buffer, int] = {}

    def add(self, array: np.ndarray, name: str = "", *, of: np.ndarray | None = None) -> Part:
        """Return where a constant is.

        Args:
            of: what it was made of: a matrix `[K, N]` that is packed in panels, rows that are each followed by zeros,
                or what is followed by zeros as a whole.
        """
        data = np.ascontiguousarray(array).tobytes()
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            buffer = Buffer(name, len(data), Space.WEIGHTS)
            self._places[key] = buffer
            self._offsets[buffer] = self._size
            self._data += [data, bytes(-len(data) % _ALIGN)]
            self._size += _up(len(data))
            self._note(array if of is None else of, array, self._offsets[buffer])
        return self._places[key].part()

    def derive(self, recipe: Recipe) -> Part:
        """Return where weights will be that are made when a plan is opened; equal ones once."""
        if recipe not in self._made:
            size = recipe.outputs * recipe.target_row * FLOAT_BYTES
            buffer = self._made[recipe] = Buffer("derived weights", size, Space.DERIVED, dtype=F32)
            self.recipes[buffer] = recipe
        return self._made[recipe].part()

    def _note(self, original: np.ndarray, array: np.ndarray, offset: int) -> None:
        """Note where an array is found again that graphs may hold too."""
        if original.nbytes < SMALLEST:
            return
        place = Place(NATIVE_WEIGHTS, offset, array.nbytes)
        if original is array or np.array_equal(original.ravel(), array.ravel()[: original.size]):
            self.held.setdefault(digest(original), replace(place, length=original.nbytes))
        elif pitch := pitch_of(original, array):
            self.held.setdefault(digest(original), replace(place, pitch=pitch))
        elif original.ndim == 2 and (panel := panels_of(original, array)):
            self.held.setdefault(digest(original), replace(place, panel=panel))
            self.held.setdefault(digest(original.T), replace(place, panel=panel, turned=True))

    def offset(self, buffer: Buffer) -> int:
        """Return the offset of a constant in the file."""
        return self._offsets[buffer]

    def file(self) -> memoryview:
        """Return the file; it ends with spare bytes, as vector loads may read past the last weight.

        It lies on 64 bytes, so that a session of this process uses it in place.
        """
        space = np.zeros(self._size + 2 * _ALIGN, np.uint8)
        content = space[-space.ctypes.data % _ALIGN :][: self._size + _ALIGN]
        at = 0
        for data in self._data:
            content[at : at + len(data)] = np.frombuffer(data, np.uint8)
            at += len(data)
        return content.data.toreadonly()


@dataclass(frozen=True)
class Placement:
    """Offsets by buffer and the bytes of each space."""

    offsets: dict[Buffer, int]
    arena: int
    state: int
    flip: int
    derived: int

    def spoilt(self) -> list[Buffer]:
        """Return the fragile buffers whose padding others may have written: it must be cleared before their first use.

        A step follows another in the same memory, so every buffer that overlaps counts, whenever it lives. One that
        lies plane on plane keeps the padding as it is.
        """
        arena = [buffer for buffer in self.offsets if buffer.space is Space.ARENA]
        return [b for b in arena if b.fragile and any(self._spoils(other, b) for other in arena)]

    def _spoils(self, other: Buffer, buffer: Buffer) -> bool:
        start, at = self.offsets[buffer], self.offsets[other]
        if other is buffer or at + other.size <= start or start + buffer.size <= at:
            return False
        assert buffer.layout is not None
        return other.layout != buffer.layout or (at - start) % buffer.layout.bytes != 0

    def place(self, part: Part, constants: Constants) -> PlanPlace:
        """Return the place of some bytes."""
        buffer = part.buffer
        start = constants.offset(buffer) if buffer.space is Space.WEIGHTS else self.offsets[buffer.before or buffer]
        return PlanPlace(buffer.space, start + part.offset, part.size)


def place_buffers(uses: Sequence[Iterable[Buffer]], kept: Iterable[Buffer] = ()) -> Placement:
    """Place every buffer.

    Args:
        uses: the buffers that each call names, in the order of the calls.
        kept: buffers of the arena that the host reads after the step, such as outputs.
    """
    lives = _lives(uses)
    for buffer in kept:
        first, _ = lives.get(buffer, (len(uses), 0))
        lives[buffer] = (first, len(uses))
    offsets: dict[Buffer, int] = {}
    ends = dict.fromkeys(Space, 0)
    for lasting in dict.fromkeys(buffer.before or buffer for buffer in lives):
        if lasting.space in (Space.STATE, Space.BEFORE, Space.DERIVED):
            offsets[lasting] = ends[lasting.space]
            ends[lasting.space] += _up(lasting.size)
    arena = {buffer: life for buffer, life in lives.items() if buffer.space is Space.ARENA}
    ends[Space.ARENA] = _pack(arena, offsets)
    return Placement(offsets, ends[Space.ARENA], ends[Space.STATE], ends[Space.BEFORE], ends[Space.DERIVED])


def lower_bound(uses: Sequence[Iterable[Buffer]], kept: Iterable[Buffer] = ()) -> int:
    """Return the live bytes of the arena at the peak: no placement needs less."""
    lives = {buffer: life for buffer, life in _lives(uses).items() if buffer.space is Space.ARENA}
    for buffer in kept:
        first, _ = lives.get(buffer, (len(uses), 0))
        lives[buffer] = (first, len(uses))
    change = np.zeros(len(uses) + 2, np.int64)
    for buffer, (first, last) in lives.items():
        change[first] += _up(buffer.size)
        change[last + 1] -= _up(buffer.size)
    return int(np.cumsum(change).max(initial=0))


def _lives(uses: Sequence[Iterable[Buffer]]) -> dict[Buffer, tuple[int, int]]:
    lives: dict[Buffer, tuple[int, int]] = {}
    for index, buffers in enumerate(uses):
        for buffer in buffers:
            first, _ = lives.get(buffer, (index, index))
            lives[buffer] = (first, index)
    return lives


def _pack(lives: dict[Buffer, tuple[int, int]], offsets: dict[Buffer, int]) -> int:
    """Give every buffer an offset; return where they end."""
    placed: list[tuple[Buffer, tuple[int, int]]] = []
    end = 0
    for buffer, life in sorted(lives.items(), key=lambda item: (-item[0].size, item[1])):
        neighbours = sorted(
            (offsets[other], offsets[other] + _up(other.size))
            for other, (first, last) in placed
            if first <= life[1] and life[0] <= last
        )
        offset = 0
        for start, stop in neighbours:
            if offset + _up(buffer.size) <= start:
                break
            offset = max(offset, stop)
        offsets[buffer] = offset
        placed.append((buffer, life))
        end = max(end, offset + _up(buffer.size))
    return end


def _up(size: int) -> int:
    return -(-max(size, 1) // _ALIGN) * _ALIGN
