"""States of a stream: pairs of an input and an output, kept in the model's metadata."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from graphs import check, data, graph, run_steps

from dvexport.graph.state import State, add_state, remove_state, state_input, states_of

TEXT = "g (float[1,3] x) => (float[1,3] y) { y = Relu(x) }"


def summing():
    """y is the sum of all x so far, by a state."""
    model = graph("g (float[1,3] x) => (float[1,3] y) { y = Identity(x) }")
    (identity,) = model.graph
    x = model.graph.inputs[0]
    read = state_input(model, "total", x)
    add = ir.Node("", "Add", [x, read])
    add.outputs[0].shape, add.outputs[0].type = x.shape, x.type
    model.graph.insert_before(identity, add)
    identity.replace_input_with(0, add.outputs[0])
    add_state(model, "total", read, add.outputs[0])
    return model


def test_a_state_feeds_back():
    model, x = summing(), data(4, 3)
    check(model)
    np.testing.assert_allclose(run_steps(model, {"x": x})["y"], x.cumsum(axis=0), atol=1e-6)
    assert states_of(model) == [State("total", "total.in", "total.out", (1, 3), "float32")]


def test_states_survive_a_file():
    model = summing()
    again = ir.from_proto(ir.to_proto(model))
    assert states_of(again) == states_of(model)
    assert states_of(model.clone()) == states_of(model)


def test_an_input_may_be_kept_as_it_is():
    """The next value is a graph input: an Identity keeps the names apart."""
    model = graph(TEXT)
    x = model.graph.inputs[0]
    read = state_input(model, "last", x)
    add_state(model, "last", read, x)
    check(model)
    assert [value.name for value in model.graph.inputs] == ["x", "last.in"]
    assert [value.name for value in model.graph.outputs] == ["y", "last.out"]


def test_remove_takes_both_halves():
    model = summing()
    read, write = remove_state(model, "total")
    assert states_of(model) == []
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert not read.is_graph_input()
    assert not write.is_graph_output()
