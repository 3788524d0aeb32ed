"""onnx-simplifier leaves out what nothing needs, and nothing that others rely on."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxsim
import pytest
from graphs import check, data, graph, ops, run
from oracle_check import traced

from dvexport.errors import PassError
from dvexport.graph.graph import DECIDES, array_of
from dvexport.graph.onnx_simplifier import simplify_graph
from dvexport.passes.pipeline import Request
from dvexport.passes.simplify import SimplifyLowered
from dvexport.targets.onnx.emit import emit
from dvexport.targets.onnx.passes import lower

TWICE = """g (float[2,64] x, float[64,64] w) => (float[2,64] y) {
    a = MatMul(x, w) b = MatMul(x, w) c = Relu(a) d = Relu(b) y = Add(c, d)
}"""


def test_what_is_computed_twice_is_shared_and_weights_are_the_same_arrays():
    weight = data(64, 64)
    model = graph(TWICE, w=weight)
    expected = run(model, x=data(2, 64))["y"]
    held = model.graph.initializers["w"].const_value
    assert simplify_graph(model)
    check(model)
    assert sorted(ops(model)) == ["Add", "MatMul", "Relu"]
    assert model.graph.initializers["w"].const_value is held
    assert not model.graph.initializers["w"].is_graph_input()
    assert [value.name for value in model.graph.inputs] == ["x"]
    np.testing.assert_array_equal(run(model, x=data(2, 64))["y"], expected)


def test_a_graph_that_is_simple_is_left_as_it_is():
    model = graph("g (float[2,64] x, float[64,64] w) => (float[2,64] y) { y = MatMul(x, w) }", w=data(64, 64))
    before = model.graph
    assert not simplify_graph(model)
    assert model.graph is before


DIALECT = """g (float[1,2,4,4] x, bool[1,2,2] mask, float[3,2,1,1] w) => (float[1,3,4,4] y) {
    u = dv.GatedConv <gate = "g"> (x, w, , , mask) a = Relu(u) b = Relu(u) y = Add(a, b)
}"""


def test_operators_of_the_dialect_keep_attributes_inputs_and_metadata():
    model = graph(DIALECT, w=data(3, 2, 1, 1))
    for node in model.graph:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = f"['', 'layer.{node.outputs[0].name}']"
    gated = model.graph[0]
    gated.metadata_props[DECIDES] = "tiles"
    assert simplify_graph(model)
    found = model.graph[0]
    assert (found.domain, found.op_type, found.attributes["gate"].as_string()) == ("dv", "GatedConv", "g")
    assert [None if v is None else v.name for v in found.inputs] == ["x", "w", None, None, "mask"]
    assert found.metadata_props == gated.metadata_props
    assert found.outputs[0].shape == ir.Shape([1, 3, 4, 4])
    assert all("layer." in node.metadata_props["pkg.torch.onnx.name_scopes"] for node in model.graph)


TABLE = """g (float[1] x, float[16,64] table, int64[200] rows) => (float[200,64] y) {
    read = Gather(table, rows) a = Add(read, x) b = Add(read, x) y = Add(a, b)
}"""


def test_tables_are_not_written_out():
    rows = np.arange(200) % 16
    model = graph(TABLE, table=data(16, 64), rows=rows.astype(np.int64))
    assert simplify_graph(model)
    assert "Gather" in ops(model)
    assert max(array.nbytes for v in model.graph.initializers.values() if (array := array_of(v)) is not None) == 4096


def test_an_artifact_shrinks_and_is_the_same_twice():
    plan = Request()
    done = lower(traced("dstep", "even"), plan)
    record = next(record for record in done.log if record.name == "SimplifyLowered")
    assert record.nodes_after < record.nodes_before
    assert emit(done.model) == emit(lower(traced("dstep", "even"), plan).model)
    assert all(node.metadata_props for node in done.model.graph if node.op_type == "Gemm")


def test_other_numbers_are_an_error(monkeypatch):
    correct = onnxsim.simplify

    def breaks(model, **options):
        found, checked = correct(model, **options)
        next(node for node in found.graph.node if node.op_type == "Relu").op_type = "Abs"
        return found, checked

    monkeypatch.setattr(onnxsim, "simplify", breaks)
    with pytest.raises(PassError, match="changed the model's numbers") as error:
        SimplifyLowered()(graph(TWICE, w=data(64, 64)))
    assert error.value.where == "y"
