"""Policies that compare differences of scores instead of scores."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import check, data, graph, ops, run

from dvexport.passes.clean_up import CleanUp
from dvexport.passes.fold_scores import FoldScores


def fold(actions, argmax="axis=2, keepdims=0", gemm="transB=1", bias=True, weight=None, channels=5):
    weight = data(channels * actions, 4, seed=1) if weight is None else weight
    model = graph(
        f"""g (float[3,4] x, float[{channels * actions},4] w, float[{channels * actions}] b)
            => (int64[3,{channels}] a)
        {{ s = Gemm<{gemm}>(x, w{", b" if bias else ""})
           n = Constant<value_ints=[3,{channels},{actions}]>() r = Reshape(s, n) a = ArgMax<{argmax}>(r) }}""",
        w=weight,
        b=data(channels * actions, seed=2),
    )
    before = run(model, x=data(3, 4))["a"]
    modified = FoldScores()(model).modified
    CleanUp()(model)
    check(model)
    np.testing.assert_array_equal(run(model, x=data(3, 4))["a"], before)
    return model, modified, before


@pytest.mark.parametrize("bias", [True, False])
def test_three_actions_become_two_differences(bias):
    model, modified, actions = fold(3, bias=bias)
    assert modified
    assert set(actions.flat) == {0, 1, 2}
    assert "ArgMax" not in ops(model)
    (gemm,) = (node for node in model.graph if node.op_type == "Gemm")
    assert list(gemm.inputs[1].shape) == [10, 4]


def test_two_actions_become_a_sign():
    model, modified, actions = fold(2)
    assert modified
    assert set(actions.flat) == {0, 1}
    assert ops(model) == ["Gemm", "Greater", "Cast"]


@pytest.mark.parametrize("equal", [(0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_of_equal_scores_the_first_wins(equal):
    weight = np.zeros((5, 3, 4), np.float32)
    weight[:, equal, :] = 1
    _, modified, actions = fold(3, bias=False, weight=weight.reshape(15, 4))
    assert modified
    assert set(actions.flat) <= {0, 1, 2}


@pytest.mark.parametrize(
    "settings",
    [
        {"actions": 4},
        {"actions": 3, "argmax": "axis=2, keepdims=0, select_last_index=1"},
        {"actions": 3, "gemm": "transB=1, alpha=2.0"},
        {"actions": 5, "argmax": "axis=1, keepdims=0", "channels": 5},
    ],
    ids=["four actions", "the last wins", "scaled", "over channels"],
)
def test_no_match(settings):
    assert not fold(**settings)[1]
