"""What is computed now, what is owed and what is kept; the states say what is stale."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import check, data, graph, ops, run, run_steps, weights
from hypothesis import given
from hypothesis import strategies as st

from dvexport.graph.state import states_of
from dvexport.passes.choose_lowering import ChooseLowering
from dvexport.passes.lowerings import Abilities
from dvexport.passes.set_frames import SetClip, SetStream
from dvexport.passes.split_paths import SplitPaths

T, C, GRID = 5, 4, (3, 2)


def gated(inputs="action, tiles"):
    return graph(
        f"""g (float[frames,3,7,5] x, float[4,3,3,3] W, float[4] B, int64[frames,4] action, bool[frames,3,2] tiles)
        => (float[frames,4,7,5] y)
        {{ y = dv.GatedConv<gate="g", pads=[1,1,1,1], activation="relu">(x, W, B, {inputs}) }}""",
        W=weights(C, 3, 3), B=data(C),
    )  # fmt: skip


def split(model, lowering, frames):
    frames(model)
    ChooseLowering(Abilities(), overrides={"g": lowering})(model)
    assert SplitPaths()(model).modified
    check(model)
    return model


def feeds(seed=0):
    rng = np.random.default_rng(seed)
    rates, share = rng.dirichlet([0.5] * 3), rng.random()
    return {
        "x": data(T, 3, 7, 5, seed=seed),
        "action": rng.choice(3, (T, C), p=rates),
        "tiles": rng.random((T, *GRID)) < share,
    }


SPLITS = [("action, tiles", "tiles"), ("action, tiles", "channels"), ("action", "groups"), (", tiles", "tiles")]
STREAMS = {case: split(gated(case[0]), case[1], SetStream()) for case in SPLITS}


@pytest.mark.parametrize("case", SPLITS, ids=str)
def test_streams(case):
    @given(st.integers(0, 2**16))
    def agrees(seed):
        whole = gated(case[0])
        expected = run(whole, **feeds(seed))["y"]
        np.testing.assert_allclose(run_steps(STREAMS[case], feeds(seed))["y"], expected, atol=1e-5)

    agrees()


@pytest.mark.parametrize("inputs", ["action, tiles", ", tiles"])
def test_clips(inputs):
    model = split(gated(inputs), "tiles", SetClip(T))
    np.testing.assert_allclose(run(model, **feeds())["y"], run(gated(inputs), **feeds())["y"], atol=1e-5)
    assert states_of(model) == []


@pytest.mark.parametrize(
    ("case", "convs", "states"),
    [
        (SPLITS[0], 2, ("g.v", "g.x", "g.stale_tiles")),
        (SPLITS[1], 3, ("g.v", "g.x", "g.stale_channels", "g.stale_tiles")),
        (SPLITS[2], 2, ("g.v", "g.x", "g.stale_channels")),
        (SPLITS[3], 1, ()),
    ],
    ids=str,
)
def test_paths_and_states(case, convs, states):
    names = ops(STREAMS[case])
    assert names.count("dv.SparseConv") == convs
    assert names.count("dv.Merge") == bool(states)
    assert "dv.GatedConv" not in names
    assert {state.name for state in states_of(STREAMS[case])} == set(states)


def test_a_masked_gate_is_left_alone():
    model = gated()
    SetStream()(model)
    ChooseLowering(Abilities(), overrides={"g": "masked"})(model)
    assert not SplitPaths()(model).modified
    assert ops(model) == ["dv.GatedConv"]
