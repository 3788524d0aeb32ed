"""What is illegal is named."""

from __future__ import annotations

import pytest
from graphs import check, graph, node_of, weights

from dvexport.errors import PassError
from dvexport.graph.state import add_state, state_input
from dvexport.passes.check_dialect import CheckDialect, problems

TEXT = """g (float[1,3,4,4] x, float[4,3,3,3] W) => (float[1,4,4,4] y)
    { u = dv.GatedConv<gate="g", pads=[1,1,1,1]>(x, W) y = Relu(u) }"""


def gated():
    return graph(TEXT, W=weights(4, 3, 3))


def test_legal():
    assert problems(gated()) == []
    assert not CheckDialect()(gated()).modified


def test_unknown_operator():
    model = graph("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    node_of(model, "Relu").domain = "dv"
    with pytest.raises(PassError, match=r"dv\.Relu is not in the dialect"):
        check(model)


def test_an_operator_of_a_runtimes_own():
    model = graph("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    node_of(model, "Relu").domain = "com.microsoft"
    with pytest.raises(PassError, match=r"is of domain com\.microsoft, and bundles hold standard operators"):
        check(model)


def test_rules_of_the_operator_and_how_many_more():
    model = gated()
    node = node_of(model, "GatedConv")
    del node.attributes["gate"]
    node.outputs[0].shape = None
    with pytest.raises(PassError, match=r"lacks attribute gate \(and 1 more\)"):
        check(model)


def test_states_come_in_pairs_of_one_shape():
    model = gated()
    read = state_input(model, "s", model.graph.inputs[0])
    add_state(model, "s", read, model.graph.inputs[0])
    check(model)
    model.graph.outputs[-1].shape = model.graph.outputs[0].shape
    assert "state s changes from [1,3,4,4] to [1,4,4,4]" in problems(model)[0]
    model.graph.outputs.pop()
    assert problems(model) == ["state s lacks its output"]


def test_names_are_used_once():
    model = gated()
    model.graph.outputs[0].name = "x"
    assert problems(model) == ["the name x is used twice"]
