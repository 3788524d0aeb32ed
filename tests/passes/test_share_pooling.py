"""Plane means from a pooling that is there anyway, where its cells are even."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import check, data, graph, ops, run

from dvexport.passes.share_pooling import SharePooling

AXES = "axes = Constant<value_ints=[2,3]>() "
UP = """r = Constant<value_ints=[0,0,0,0,1,1,1,1]>() a = Gather<axis=1>(t, r) b = Gather<axis=2>(a, r)
    one = Constant<value_ints=[1]>() s = Unsqueeze(b, one) """


def share(body, height=8):
    model = graph(
        f"""g (float[3,4,{height},8] x, float[3,2,2] t) => (float[3,4] y, float[3,4,2,2] p)
        {{ p = AveragePool<kernel_shape=[4,4], strides=[4,4]>(x) {AXES} {body} }}"""
    )
    feeds = {"x": data(3, 4, height, 8), "t": (data(3, 2, 2) > 0).astype(np.float32)}
    before = run(model, **feeds)["y"]
    modified = SharePooling()(model).modified
    check(model)
    np.testing.assert_allclose(run(model, **feeds)["y"], before, atol=1e-6)
    return model, modified


def test_a_mean_is_taken_from_the_grid():
    model, modified = share("y = ReduceMean<keepdims=0>(x, axes)")
    assert modified
    assert ops(model) == ["AveragePool", "ReduceMean"]
    assert list(model.graph)[-1].inputs[0].name == "p"


@pytest.mark.parametrize("order", ["x, s", "s, x"])
def test_a_masked_mean_is_masked_on_the_grid(order):
    model, modified = share(f"{UP} m = Mul({order}) y = ReduceMean<keepdims=0>(m, axes)")
    assert modified
    assert list(model.graph)[-1].inputs[0].producer().inputs[0].name == "p"


@pytest.mark.parametrize(
    ("body", "height"),
    [
        ("y = ReduceMean<keepdims=0>(x, axes)", 9),  # a row belongs to no cell
        ("v = Neg(x) y = ReduceMean<keepdims=0>(v, axes)", 8),
        (f"{UP.replace('1,1,1,1', '0,1,1,1')} m = Mul(x, s) y = ReduceMean<keepdims=0>(m, axes)", 8),
        ("y = ReduceMax<keepdims=0>(x, axes)", 8),
    ],
    ids=["uneven", "another value", "another upsampling", "no mean"],
)
def test_no_match(body, height):
    assert not share(body, height)[1]
