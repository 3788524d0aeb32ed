"""Executed MACs against a count, one by one, of the values that a lazy stream has to compute."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dvexport.dialect.flops import FlopTable, GatedMacs, flop_table
from dvexport.models import zoo
from dvexport.trace import trace

CHANNELS = 4
FIRST = GatedMacs("g", "conv1", cin=3, cout=CHANNELS, taps=9, size=(7, 5), acts=True, reads="", tiled=True)
SECOND = GatedMacs("g", "conv2", cin=CHANNELS, cout=6, taps=9, size=(7, 5), acts=False, reads="g", tiled=True)
TABLE = FlopTable(fixed=1000, decisions=10, gated=[FIRST, SECOND])


def pixels(tiles, size):
    """The set of active pixels, by the nearest rule."""
    grid = tiles.shape
    return {
        (y, x)
        for y, x in itertools.product(range(size[0]), range(size[1]))
        if tiles[y * grid[0] // size[0], x * grid[1] // size[1]]
    }


def brute_force(decisions):
    """By frame: MACs of both convolutions, from sets of (frame, channel, pixel) that V must be known at.

    A value of V is computed when a frame first needs it, and charged to that frame; what was computed is kept
    for one frame. A product of two masks is what is kept: channels computed and tiles active.
    """
    first, second = [], []
    known = None
    for t, now in enumerate(decisions):
        action, active = now["g", "action"], pixels(now["g", "tiles"], FIRST.size)
        computed = {(t, c, p) for c in range(CHANNELS) for p in active if action[c] == 2}
        wanted = {(t - 1, c, p) for c in range(CHANNELS) for p in active if action[c] == 1 and t > 0}
        owed = wanted - (known or set())
        known = computed
        first.append((len(computed) + len(owed)) * FIRST.cin * FIRST.taps)
        reads = sum(1 for c in range(CHANNELS) if action[c] != 0)
        second.append(reads * SECOND.cout * SECOND.taps * len(active))
    return first, second


@st.composite
def decisions(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    grid = draw(st.sampled_from([(1, 1), (2, 2), (3, 2), (7, 5), (4, 3)]))
    share = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    rates = rng.dirichlet([0.7] * 3)
    frames = draw(st.integers(1, 6))
    return [
        {("g", "action"): rng.choice(3, CHANNELS, p=rates), ("g", "tiles"): rng.random(grid) < share}
        for _ in range(frames)
    ]


@given(decisions())
def test_executed_equals_enumeration(frames):
    first, second = brute_force(frames)
    for t, now in enumerate(frames):
        before = frames[t - 1] if t else None
        assert FIRST.executed(now, before) == first[t]
        assert SECOND.executed(now, before) == second[t]
    executed = TABLE.executed(frames)
    assert executed.gates == {"g": [a + b for a, b in zip(first, second, strict=True)]}
    assert executed.frames == [1010 + gate for gate in executed.gates["g"]]


def everything(grid=(3, 2)):
    return {("g", "action"): np.full(CHANNELS, 2), ("g", "tiles"): np.ones(grid, bool)}


def test_everything_computed_is_dense():
    assert TABLE.executed([everything()] * 3).frames == [TABLE.dense + TABLE.decisions] * 3
    assert TABLE.dense == 1000 + 7 * 5 * 9 * (3 * CHANNELS + CHANNELS * 6)
    assert TABLE.dense_of("g") == TABLE.dense - TABLE.fixed


def test_reuse_of_what_was_computed_is_free():
    reuse = everything() | {("g", "action"): np.ones(CHANNELS, int)}
    assert FIRST.executed(reuse, everything()) == 0
    assert FIRST.executed(reuse, reuse) == FIRST.dense
    assert FIRST.executed(reuse, None) == 0


def test_inputs_may_follow_another_gate():
    chained = GatedMacs("g", "conv2", cin=8, cout=CHANNELS, taps=1, size=(7, 5), acts=True, reads="f", tiled=True)
    now = everything() | {("f", "action"): np.array([2, 1, 0, 0, 0, 0, 0, 0])}
    before = everything() | {("g", "action"): np.zeros(CHANNELS, int), ("f", "action"): np.full(8, 2)}
    assert chained.executed(now, None) == 2 * CHANNELS * 35
    reuse = now | {("g", "action"): np.ones(CHANNELS, int)}
    assert chained.executed(reuse, before) == 8 * CHANNELS * 35  # what is owed reads the previous frame's inputs


def test_a_leading_frame_axis_is_allowed():
    now = everything()
    batched = {key: value[None] for key, value in now.items()}
    assert FIRST.executed(batched, batched) == FIRST.executed(now, now)


def test_dict_round_trip():
    assert FlopTable.from_dict(json.loads(json.dumps(TABLE.to_dict()))) == TABLE


@pytest.mark.parametrize("size", [(64, 64), (50, 38)])
def test_dense_count_is_torch_s(size):
    net = zoo.create("tsn_resnet18", width=0.25, classes=7)
    table = flop_table(trace(net, size))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, *size))
    assert table.dense == table.fixed == counter.get_total_flops() // 2
    assert table.decisions == 0
    assert table.gated == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dstep_resnet18", "adafuse_resnet18"])
def test_gated_model_contains_its_dense_model(name):
    settings = {"width": 0.125, "classes": 7}
    dense = flop_table(trace(zoo.create("tsn_resnet18", **settings), (64, 64)))
    gated = flop_table(trace(zoo.create(name, **settings), (64, 64)))
    assert gated.dense == dense.dense
    assert gated.decisions > 0
    assert len(gated.gates) == 8
    assert len(gated.gated) == 16
