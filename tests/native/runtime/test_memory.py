"""Where buffers lie: what is alive at the same time lies apart, and no more is taken than said."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_harness import host_machine
from native_networks import artifact, variants
from oracle_check import FRAMES, traced

from dvexport.targets.tvm.calls.memory import Buffer, Constants, Placement, lower_bound, place_buffers
from dvexport.targets.tvm.calls.write import write_draft
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.plan import Space

LINE = 64
LAYOUTS = (Plane((4, 4)), Plane((5, 3)))
FLOAT = 4


@st.composite
def arena_buffers(draw: st.DrawFn, name: str) -> Buffer:
    """Some bytes, or planes; planes may need their padding to be zero already."""
    layout = draw(st.sampled_from((None, *LAYOUTS)))
    if layout is None:
        return Buffer(name, draw(st.integers(0, 5000)))
    return Buffer(name, draw(st.integers(1, 4)) * layout.bytes, layout=layout, fragile=draw(st.booleans()))


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[list[Buffer]], list[Buffer]]:
    """Calls that name random buffers of all spaces, and the buffers that the host reads after them."""
    sizes = st.integers(0, 5000)
    arena = [draw(arena_buffers(f"b{i}")) for i in range(draw(st.integers(1, 14)))]
    kept_in_place = [Buffer(f"s{i}", draw(sizes), Space.STATE) for i in range(draw(st.integers(0, 3)))]
    before = [Buffer(f"f{i}", draw(sizes), Space.BEFORE) for i in range(draw(st.integers(0, 3)))]
    after = [Buffer(b.name, b.size, Space.AFTER, b) for b in before]
    every = [*arena, *kept_in_place, *before, *after]
    call = st.lists(st.sampled_from(every), min_size=1, max_size=4)
    uses = draw(st.lists(call, min_size=1, max_size=20))
    return uses, draw(st.lists(st.sampled_from(arena), max_size=3, unique_by=id))


def lives(uses: Sequence[Sequence[Buffer]], kept: Sequence[Buffer]) -> dict[Buffer, set[int]]:
    """The moments at which each buffer of the arena holds something: from its first call to its last."""
    found: dict[Buffer, set[int]] = {}
    for buffer in {b for call in uses for b in call} | set(kept):
        named = [i for i, call in enumerate(uses) if buffer in call] + [len(uses)] * (buffer in kept)
        found[buffer] = set(range(min(named), max(named) + 1))
    return {buffer: life for buffer, life in found.items() if buffer.space is Space.ARENA}


def span(placement: Placement, buffer: Buffer) -> range:
    start = placement.offsets[buffer.before or buffer]
    return range(start, start + buffer.size)


def disjoint(a: range, b: range) -> bool:
    return a.stop <= b.start or b.stop <= a.start


@given(programs())
def test_what_lives_at_once_lies_apart(program):
    uses, kept = program
    placement, alive = place_buffers(uses, kept), lives(uses, kept)
    assert set(alive) <= set(placement.offsets)
    for a in alive:
        assert placement.offsets[a] % LINE == 0
        assert span(placement, a).stop <= placement.arena
        for b in alive:
            if a is not b and alive[a] & alive[b]:
                assert disjoint(span(placement, a), span(placement, b)), (a, b)


@given(programs())
def test_padding_is_zero_when_it_has_to_be(program):
    """Two steps in one memory: kernels that write images alone find zeros around them, or these are cleared first."""
    uses, _ = program
    placement = place_buffers(uses)
    spoilt, memory = set(placement.spoilt()), np.zeros(placement.arena // FLOAT, np.float32)
    for _ in range(2):
        begun: set[Buffer] = set()
        for buffer in (b for call in uses for b in call if b.space is Space.ARENA):
            if buffer in begun:
                continue
            begun.add(buffer)
            held = span(placement, buffer)
            floats = memory[held.start // FLOAT : -(-held.stop // FLOAT)]
            if buffer.layout is None:
                floats[:] = 7
                continue
            image = np.tile(buffer.layout.inside() != 0, len(floats) // buffer.layout.size)
            if not buffer.fragile or buffer in spoilt:
                floats[:] = 0
            assert not floats[~image].any(), buffer
            floats[image] = 7


@given(programs())
def test_states_lie_apart_for_ever(program):
    uses, kept = program
    placement = place_buffers(uses, kept)
    named = {buffer.before or buffer for call in uses for buffer in call}
    for space, end in ((Space.STATE, placement.state), (Space.BEFORE, placement.flip)):
        states = [buffer for buffer in named if buffer.space is space]
        for i, a in enumerate(states):
            assert placement.offsets[a] % LINE == 0
            assert span(placement, a).stop <= end
            assert all(disjoint(span(placement, a), span(placement, b)) for b in states[:i])


@given(programs())
def test_the_bound_is_one(program):
    """Never above what is taken, and what the fullest moment holds."""
    uses, kept = program
    alive = lives(uses, kept)
    fullest = max(
        (sum(_up(b.size) for b, life in alive.items() if moment in life) for moment in range(len(uses) + 1)), default=0
    )
    assert lower_bound(uses, kept) == fullest <= place_buffers(uses, kept).arena


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=12))
def test_a_chain_takes_no_more_than_three_of_its_largest(sizes):
    """Each call reads what the one before wrote: a buffer has two neighbours in life, and lies above both at worst."""
    buffers = [Buffer(f"b{i}", size) for i, size in enumerate(sizes)]
    uses = [list(pair) for pair in pairwise(buffers)] or [buffers]
    placement = place_buffers(uses)
    assert lower_bound(uses) <= placement.arena <= 3 * _up(max(sizes))


def test_equal_constants_are_stored_once_and_vectors_may_read_past_the_last():
    constants = Constants()
    one, same, other = (constants.add(np.full(5, value, np.float32)) for value in (1, 1, 2))
    assert one == same
    assert constants.offset(one.buffer) % LINE == constants.offset(other.buffer) % LINE == 0
    start = constants.offset(other.buffer)
    data = constants.file()
    assert np.frombuffer(data[start : start + 20], np.float32).tolist() == [2] * 5
    assert len(data) >= start + 20 + LINE


@pytest.mark.slow
def test_variants_share_weights():
    """A forced plan beside the gated one costs nothing; a dense one what algorithms it alone uses need."""
    models = variants(traced("dstep", "uneven"), "stream", FRAMES)
    constants, sizes = Constants(), []
    for model in (models["gated"], models["forced"], models["dense"]):
        write_draft(model, host_machine(), constants)
        sizes.append(len(constants.file()))
    assert sizes[1] < 1.01 * sizes[0]
    assert sizes[2] < 1.6 * sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dstep", "adafuse", "tiles", "bottleneck", "chained"])
def test_arena_of_a_network(kind, record_property):
    """Reported, and near the bound: what is placed is planes of a few sizes."""
    made = artifact(kind, "even")
    record_property("arena", made.memory["arena"])
    record_property("arena_bound", made.memory["arena_bound"])
    assert made.memory["arena_bound"] <= made.memory["arena"] <= 1.5 * made.memory["arena_bound"]


def _up(size: int) -> int:
    return -(-max(size, 1) // LINE) * LINE
