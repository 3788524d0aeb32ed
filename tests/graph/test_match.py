"""Questions asked of nodes and values."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from graphs import graph

from dvexport.dialect.spec import specification
from dvexport.errors import PassError
from dvexport.graph.match import attributes_of, is_op, made_by, only_user, other_input

TEXT = """
<ir_version: 9, opset_import: ["" : 20, "other" : 1]>
g (float[2] x, float[2] y) => (float[2] z, float[2] seen) {
    seen = Relu (x)
    sum = Add (x, y)
    foreign = other.Add (sum, y)
    soft = Softmax <axis = 0> (foreign)
    z = Mul (soft, soft)
}
"""


def _nodes() -> dict[str, ir.Node]:
    model = ir.from_onnx_text(TEXT)
    return {str(node.outputs[0].name): node for node in model.graph}


def test_an_operator_is_known_by_name_and_domain() -> None:
    nodes = _nodes()
    assert is_op(nodes["sum"], "Mul", "Add")
    assert not is_op(nodes["sum"], "Mul")
    assert not is_op(nodes["foreign"], "Add")
    assert is_op(nodes["foreign"], "Add", domain="other")
    assert not is_op(None, "Add")


def test_the_standard_domain_has_two_names() -> None:
    assert is_op(ir.Node("ai.onnx", "Add", []), "Add")


def test_what_made_a_value() -> None:
    nodes = _nodes()
    assert made_by(nodes["foreign"].inputs[0], "Add") is nodes["sum"]
    assert made_by(nodes["sum"].inputs[0], "Add") is None, "an input of the graph has no producer"
    assert made_by(None, "Add") is None


def test_the_only_user_of_a_value() -> None:
    nodes = _nodes()
    assert only_user(nodes["sum"].outputs[0]) is nodes["foreign"]
    assert only_user(nodes["soft"].outputs[0]) is None, "one node reads it twice"
    assert only_user(nodes["seen"].outputs[0]) is None, "the host reads it"


def test_operands_and_attributes() -> None:
    nodes = _nodes()
    x, y = nodes["sum"].inputs
    assert other_input(nodes["sum"], x) is y  # type: ignore[arg-type]
    assert other_input(nodes["sum"], y) is x  # type: ignore[arg-type]
    assert attributes_of(nodes["soft"]) == {"axis": 0}
    assert attributes_of(nodes["sum"]) == {}


def test_a_specification_is_asked_of_nodes_of_the_dialect_only():
    model = graph("g (float[1,2] x) => (float[1,2] y) { y = Relu(x) }")
    with pytest.raises(PassError, match="no operator of the dialect") as error:
        specification(model.graph[0])
    assert "Relu" in (error.value.where or "")
