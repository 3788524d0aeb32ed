"""Consumers of a gate learn which channels are exactly zero."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import check, data, graph, ops, run, weights

from dvexport.dialect import operator_of
from dvexport.passes.propagate_inactive import PropagateInactive

GATED = 'u = dv.GatedConv<gate="g", pads=[1,1,1,1]>(x, W, , action)'
HEAD = "g (float[3,2,8,8] x, float[4,2,3,3] W, float[5,4,3,3] R, int64[3,4] action)"
ARRAYS = {"W": weights(4, 2, 3), "R": weights(5, 4, 3, seed=1)}


def propagate(body, output="float[3,5,a,b] y"):
    model = graph(f"{HEAD} => ({output}) {{ {body} }}", **ARRAYS)
    feeds = {"x": data(3, 2, 8, 8), "action": np.random.default_rng(0).integers(0, 3, (3, 4))}
    before = run(model, **feeds)
    result = PropagateInactive()(model)
    check(model)
    for name, value in run(model, **feeds).items():
        np.testing.assert_allclose(value, before[name], atol=1e-6)
    return model, result.modified


@pytest.mark.parametrize(
    "between", ["Identity", "Relu", "MaxPool<kernel_shape=[2,2]>", "AveragePool<kernel_shape=[2,2]>"]
)
def test_plain_convolution_becomes_gated(between):
    model, modified = propagate(f"{GATED} v = {between}(u) y = Conv<strides=[2,2]>(v, R)")
    assert modified
    assert ops(model) == ["dv.GatedConv", between.split("<")[0], "Equal", "Not", "dv.GatedConv"]
    reader = list(model.graph)[-1]
    inputs = operator_of(reader).bind(reader)
    assert inputs["active_in"].producer().op_type == "Not"
    assert inputs["action"] is inputs["tiles"] is None
    assert reader.attributes["gate"].as_string() == "g"
    assert reader.attributes["strides"].as_ints() == (2, 2)
    assert all(node.outputs[0].shape is not None for node in model.graph)


def test_a_gated_reader_is_promised():
    model, modified = propagate(f'{GATED} y = dv.GatedConv<gate="h">(u, R)')
    assert modified
    assert ops(model) == ["dv.GatedConv", "Equal", "Not", "dv.GatedConv"]


@pytest.mark.parametrize(
    "body",
    [
        f"{GATED} v = Sigmoid(u) y = Conv(v, R)",  # sigmoid(0) is one half
        f"{GATED} v = Add(u, u) y = Conv(v, R)",
        'u = dv.GatedConv<gate="g", pads=[1,1,1,1]>(x, W) y = Conv(u, R)',
        f'{GATED} y = Conv<auto_pad="SAME_UPPER">(u, R)',
    ],
)
def test_no_promise(body):
    model, modified = propagate(body)
    assert not modified
    assert "Not" not in ops(model)


def test_a_given_promise_is_kept():
    body = f"{GATED} b = Equal(action, action)" + ' y = dv.GatedConv<gate="h">(u, R, , , , b)'
    model, modified = propagate(body)
    assert not modified
    assert list(model.graph)[-1].inputs[5].name == "b"
