"""Permuting a gate's channels with all that reads them leaves the function as it is."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from graphs import check, data, graph, run, weights
from hypothesis import given
from hypothesis import strategies as st

from dvexport.passes.choose_lowering import ChooseLowering
from dvexport.passes.group_channels import ChannelStatistics, GroupChannels, group_order, group_rate, output_groups
from dvexport.passes.lowerings import Abilities

C = 48
CHAIN = """u = dv.GatedConv<gate="g", pads=[1,1,1,1], activation="relu">(x, W, B, a)
    zero = Constant<value_int=0>() none = Equal(a, zero) active = Not(none)
    z = dv.GatedConv<gate="g", pads=[1,1,1,1]>(u, R, , , , active)"""


def chain(body):
    return graph(
        f"""g (float[1,4,6,6] x, float[48,4,3,3] W, float[48] B, float[5,48,3,3] R, int64[1,48] a, float[1,48,6,6] r)
        => (float[1,c,6,6] y) {{ {body} }}""",
        W=weights(C, 4, 3), B=data(C), R=weights(5, C, 3),
    )  # fmt: skip


def statistics():
    seen = np.random.default_rng(0).integers(0, 3, (20, C))
    seen[:, ::3], seen[:, 1::3] = 2, 0
    return {"g": ChannelStatistics(seen)}


def group(body, lowering="groups"):
    model = chain(body)
    feeds = {"x": data(1, 4, 6, 6), "a": np.random.default_rng(1).integers(0, 3, (1, C)), "r": data(1, C, 6, 6)}
    before = run(model, **feeds)["y"]
    ChooseLowering(Abilities(), overrides={"g": lowering})(model)
    modified = GroupChannels(statistics())(model).modified
    check(model)
    np.testing.assert_allclose(run(model, **feeds)["y"], before, atol=1e-5)
    return model, modified


def test_permuting_keeps_the_function():
    model, modified = group(f"{CHAIN} y = Relu(z)")
    assert modified
    order, edges = group_order(statistics()["g"].actions)
    first, second = (node for node in model.graph if node.op_type == "GatedConv")
    np.testing.assert_array_equal(first.inputs[1].const_value.numpy(), weights(C, 4, 3)[order])
    np.testing.assert_array_equal(first.inputs[2].const_value.numpy(), data(C)[order])
    np.testing.assert_array_equal(second.inputs[1].const_value.numpy(), weights(5, C, 3)[:, order])
    assert output_groups(first, C) == list(pairwise(edges))


@pytest.mark.parametrize(
    "tail", ["y = Relu(u)", "v = Add(u, r) y = Relu(v)", "v = Add(r, u) y = Relu(v)", "y = Concat<axis=1>(r, u)"]
)
def test_what_others_read_is_left_alone(tail):
    _, modified = group(f"{CHAIN} {tail}")
    assert not modified


def test_an_output_is_left_alone():
    assert not group(CHAIN.replace("u = ", "y = ").replace("(u, R", "(y, R"))[1]


def test_other_lowerings_are_left_alone():
    assert not group(f"{CHAIN} y = Relu(z)", "channels")[1]


def test_hand_made_statistics():
    """Always first, never last, and those active together side by side."""
    together = np.array([[2, 0], [0, 2], [1, 0], [0, 1], [2, 0], [0, 2]])
    actions = np.full((6, 64), 2)
    actions[:, 16:48] = np.tile(together, (1, 16))
    actions[:, 48:] = 0
    mix = np.random.default_rng(0).permutation(64)
    order, edges = group_order(actions[:, mix])
    ordered = actions[:, mix][:, order]
    assert edges == [0, 16, 32, 48, 64]
    for first, last in pairwise(edges):
        active = ordered[:, first:last] != 0
        assert (active == active[:, :1]).all()
    assert (ordered[:, :16] == 2).all()
    assert not ordered[:, 48:].any()
    assert group_rate(actions) == pytest.approx(0.5)


@given(seed=st.integers(0, 9999), frames=st.integers(1, 9), channels=st.integers(1, 90))
def test_order_is_a_permutation_and_edges_are_a_partition(seed, frames, channels):
    rng = np.random.default_rng(seed)
    actions = rng.choice(3, (frames, channels), p=rng.dirichlet([0.5] * 3))
    order, edges = group_order(actions)
    assert sorted(order) == list(range(channels))
    assert edges[0] == 0
    assert edges[-1] == channels
    assert (np.diff(edges) > 0).all()
    assert channels < 16 or (np.diff(edges) >= 16).all()
    assert np.mean(actions != 0) <= group_rate(actions) + 1e-9 <= 1 + 1e-6
