"""Equal things are shared, unused things dropped."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from graphs import check, data, graph, ops, run

from dvexport.graph.state import add_state, state_input, states_of
from dvexport.passes.clean_up import CleanUp


def test_equal_expressions_and_constants_are_shared():
    model = graph(
        """g (float[2,3] x) => (float[2,3] y) {
            a = Constant<value_floats=[1.0,2.0,3.0]>() b = Constant<value_floats=[1.0,2.0,3.0]>()
            p = Add(x, a) q = Add(x, b) unused = Neg(x) y = Mul(p, q)
        }"""
    )
    x = data(2, 3)
    expected = run(model, x=x)["y"]
    CleanUp()(model)
    check(model)
    assert ops(model) == ["Add", "Mul"]
    assert len(model.graph.initializers) == 1
    np.testing.assert_array_equal(run(model, x=x)["y"], expected)


def test_constants_that_are_not_contiguous_are_kept_right():
    w = data(3, 2)
    model = graph("g (float[2,3] x, float[3,2] w) => (float[2,2] y) { y = MatMul(x, w) }", w=w)
    model.graph.initializers["w"].const_value = ir.tensor(np.asfortranarray(w), name="w")
    CleanUp()(model)
    np.testing.assert_allclose(run(model, x=data(2, 3))["y"], data(2, 3) @ w, atol=1e-6)


def test_states_that_nothing_reads_are_dropped_one_after_another():
    model = graph("g (float[1,3] x) => (float[1,3] y) { y = Relu(x) }")
    x = model.graph.inputs[0]
    first, second = state_input(model, "first", x), state_input(model, "second", x)
    add_state(model, "first", first, x)
    add_state(model, "second", second, first)  # reads the first, and is read by nobody
    CleanUp()(model)
    check(model)
    assert states_of(model) == []
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert ops(model) == ["Relu"]
