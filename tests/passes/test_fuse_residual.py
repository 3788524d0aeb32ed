"""relu(identity + S * conv) becomes one SparseConv, where nothing else needs its parts."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import check, data, graph, node_of, ops, run, weights

from dvexport.dialect import operator_of
from dvexport.dialect.facts import is_nonnegative
from dvexport.passes.fuse_residual import FuseResidual

HEAD = """g (float[2,3,7,5] x, float[4,3,3,3] W, float[2,4,7,5] identity, bool[2,3,2] tiles, bool[2,4] rows,
    float[1,4,1,1] channel)"""
CONV = 'z = dv.SparseConv<gate="g", pads=[1,1,1,1]>(x, W, , , tiles)'

ROWS = CONV.replace(", , tiles", ", rows, tiles")
ACTIVE = CONV.replace("z =", "y =").replace('gate="g"', 'gate="g", activation="relu"')


def fuse(body, output="float[2,4,7,5] y"):
    model = graph(f"{HEAD} => ({output}) {{ {body} }}", W=weights(4, 3, 3))
    rng = np.random.default_rng(0)
    feeds = {
        "x": data(2, 3, 7, 5), "identity": data(2, 4, 7, 5, seed=1), "tiles": rng.random((2, 3, 2)) < 0.5,
        "rows": rng.random((2, 4)) < 0.5, "channel": data(1, 4, 1, 1, seed=2),
    }  # fmt: skip
    before = run(model, **feeds)
    modified = FuseResidual()(model).modified
    check(model)
    for name, value in run(model, **feeds).items():
        np.testing.assert_allclose(value, before[name], atol=1e-6)
    return model, modified


@pytest.mark.parametrize("order", ["z, identity", "identity, z"])
def test_the_sum_is_folded(order):
    model, modified = fuse(f"{CONV} s = Add({order}) y = Relu(s)")
    assert modified
    assert ops(model) == ["Relu", "dv.SparseConv"]
    inputs = operator_of(node_of(model, "SparseConv")).bind(node_of(model, "SparseConv"))
    assert inputs["residual"].name == "identity"
    assert inputs["base"].producer().op_type == "Relu"


def test_an_identity_that_is_not_negative_is_its_own_base():
    model, modified = fuse(f"i = Relu(identity) {CONV} s = Add(z, i) y = Relu(s)")
    assert modified
    assert ops(model) == ["Relu", "dv.SparseConv"]
    inputs = operator_of(node_of(model, "SparseConv")).bind(node_of(model, "SparseConv"))
    assert inputs["residual"] is inputs["base"]


def test_without_tiles_there_is_no_base():
    conv = 'z = dv.SparseConv<gate="g", pads=[1,1,1,1]>(x, W)'
    model, modified = fuse(f"{conv} s = Add(z, identity) y = Relu(s)")
    assert modified
    assert ops(model) == ["dv.SparseConv"]
    assert operator_of(node_of(model, "SparseConv")).bind(node_of(model, "SparseConv"))["base"] is None


@pytest.mark.parametrize(
    ("body", "output"),
    [
        (f"{CONV} s = Add(z, identity) y = Relu(s) other = Neg(z)", "float[2,4,7,5] y, float[2,4,7,5] other"),
        (f"{CONV} s = Add(z, identity) y = Relu(s) other = Neg(s)", "float[2,4,7,5] y, float[2,4,7,5] other"),
        (f"{CONV} s = Add(z, identity) y = Relu(s)", "float[2,4,7,5] y, float[2,4,7,5] z"),
        (f"{CONV} s = Add(z, identity) y = Relu(s)", "float[2,4,7,5] y, float[2,4,7,5] s"),
        (f"{ROWS} s = Add(z, identity) y = Relu(s)", None),
        (CONV.replace('gate="g"', 'gate="g", activation="relu"') + " s = Add(z, identity) y = Relu(s)", None),
        (f"{CONV.replace('tiles)', 'tiles, , , identity)')} s = Add(z, identity) y = Relu(s)", None),
        (f"{CONV} s = Add(z, identity) y = Sigmoid(s)", None),
        (f"{CONV} s = Sub(identity, z) y = Relu(s)", None),
        (f"{CONV} s = Add(z, z) y = Relu(s)", None),
        (f"{CONV} s = Add(z, channel) y = Relu(s)", None),
        ("s = Add(identity, identity) y = Relu(s)", None),
    ],
    ids=["conv has another user", "sum has another user", "conv is an output", "sum is an output", "rows", "activation",
         "base", "no relu", "no sum", "sum with itself", "broadcast", "no conv"],
)  # fmt: skip
def test_no_match(body, output):
    model, modified = fuse(body, output or "float[2,4,7,5] y")
    assert not modified
    node = next((n for n in model.graph if n.op_type == "SparseConv"), None)
    assert node is None or operator_of(node).bind(node)["residual"] is None


@pytest.mark.parametrize(
    ("body", "known"),
    [
        ("y = Relu(identity)", True),
        ("a = Relu(identity) y = MaxPool<kernel_shape=[1,1]>(a)", True),
        ("a = Abs(identity) b = Identity(a) y = AveragePool<kernel_shape=[1,1]>(b)", True),
        (ACTIVE, True),
        (CONV.replace("z =", "y ="), False),
        (ACTIVE.replace("tiles)", "tiles, , , identity)"), False),
        ("y = Identity(identity)", False),
        ("y = Exp(identity)", False),  # never negative, but not known to be
        ("a = Relu(identity) y = Neg(a)", False),
        ("y = MaxPool<kernel_shape=[1,1]>(identity)", False),
    ],
)  # fmt: skip
def test_is_nonnegative(body, known):
    model = graph(f"{HEAD} => (float[2,4,7,5] y) {{ {body} }}", W=weights(4, 3, 3))
    assert is_nonnegative(model.graph.outputs[0]) is known
    assert not is_nonnegative(model.graph.inputs[0])
