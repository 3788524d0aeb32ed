"""The optimizer folds, and is caught when it changes a number."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import check, data, graph, ops, run
from onnxscript import optimizer

from dvexport.errors import PassError
from dvexport.passes.simplify import Simplify

TEXT = """g (float[frames,3] x, float[3,3] w) => (float[frames,3] y) {
    one = Constant<value_float=1.0>() v = Add(w, one) u = Identity(x) y = MatMul(u, v)
}"""


def test_constants_are_folded():
    model = graph(TEXT, w=data(3, 3))
    expected = run(model, x=data(4, 3))["y"]
    assert Simplify()(model).modified
    check(model)
    assert ops(model) == ["MatMul"]
    np.testing.assert_allclose(run(model, x=data(4, 3))["y"], expected, atol=1e-6)
    assert not Simplify()(model).modified


def test_other_numbers_are_an_error(monkeypatch):
    def breaks(model, **limits):
        weight = model.graph.initializers["w"]
        weight.const_value = type(weight.const_value)(weight.const_value.numpy() * 1.01, name="w")

    monkeypatch.setattr(optimizer, "optimize_ir", breaks)
    with pytest.raises(PassError, match="changed the model's numbers") as error:
        Simplify()(graph(TEXT, w=data(3, 3)))
    assert error.value.where == "y"
