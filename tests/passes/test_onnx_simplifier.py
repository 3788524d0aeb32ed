"""onnx-simplifier on graphs of ours: what it shortens, what comes back as it was, and when it runs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxsim
import pytest
from graphs import check, data, graph, ops, run

from dvexport.errors import PassError
from dvexport.graph.graph import DECIDES
from dvexport.passes.onnx_simplifier import OnnxSimplifier, simplify_structure
from dvexport.passes.update_in_place import UpdateInPlace
from dvexport.targets.onnx.passes import PASSES

SCOPES = "pkg.torch.onnx.name_scopes"

LONG = """g (float[2,16] x, float[16,32] w) => (float[2,32] y, float[64] z) {
    wide = Constant<value_ints=[1,2,16]>() flat = Constant<value_ints=[2,16]>() line = Constant<value_ints=[64]>()
    a = Reshape(x, wide) b = Reshape(a, flat) m = MatMul(b, w) y = Relu(m) z = Reshape(y, line)
}"""

GATED = """g (float[frames,2,8,8] x, float[3,2,3,3] W, int64[frames,3] action) => (float[frames,3,8,8] y) {
    sum = Identity(x)
    v = dv.GatedConv<gate="g", pads=[1,1,1,1]>(sum, W, , action) y = dv.Delay<name="d">(v, v)
}"""


def marked(text, **constants):
    """Return a graph whose nodes say where they are from."""
    model = graph(text, **constants)
    for node in model.graph:
        node.metadata_props[SCOPES] = f"['{node.outputs[0].name}']"
        node.metadata_props[DECIDES] = "tokens"
    model.metadata_props["dv.states"] = "[]"
    return model


def test_a_chain_gets_shorter_and_keeps_its_numbers():
    model = marked(LONG, w=data(16, 32))
    expected = run(model, x=data(2, 16))
    assert OnnxSimplifier()(model).modified
    check(model)
    assert "MatMul" in ops(model)
    assert ops(model).count("Reshape") == 1
    for name, value in run(model, x=data(2, 16)).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6)
    assert not OnnxSimplifier()(model).modified, "it is as short as it gets"


def test_what_it_drops_comes_back():
    model = marked(LONG, w=data(16, 32))
    weight = model.graph.initializers["w"].const_value
    simplify_structure(model)
    assert model.graph.initializers["w"].const_value is weight, "weights are the same arrays"
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert all(node.metadata_props[DECIDES] == "tokens" for node in model.graph)
    product = next(node for node in model.graph if node.op_type == "MatMul")
    assert product.metadata_props[SCOPES] == "['m']"
    assert dict(model.metadata_props) == {"dv.states": "[]"}
    assert all(value.shape is not None and value.type is not None for node in model.graph for value in node.outputs)


def test_a_new_node_is_from_where_what_it_reads_is_from():
    model = marked("""g (float[4,4,1,1] x, float[4,4,1,1] w) => (float[4,4] y) {
        made = Conv(x, w) shape = Constant<value_ints=[1,4,4,1]>() wide = Reshape(made, shape)
        axes = Constant<value_ints=[0,3]>() y = Squeeze(wide, axes)
    }""", w=data(4, 4, 1, 1))  # fmt: skip
    before = {node.outputs[0].name for node in model.graph}
    assert simplify_structure(model)
    assert all(node.metadata_props for node in model.graph)
    new = [node for node in model.graph if node.outputs[0].name not in before]
    assert all(node.metadata_props[SCOPES] == "['made']" for node in new)


def test_operators_of_the_dialect_are_left_alone():
    model = marked(GATED, W=data(3, 2, 3, 3))
    gate = next(node for node in model.graph if node.op_type == "GatedConv")
    given = {name: attribute.value for name, attribute in gate.attributes.items()}
    simplify_structure(model)
    check(model)
    assert ops(model) == ["dv.GatedConv", "dv.Delay"]
    gate = next(node for node in model.graph if node.op_type == "GatedConv")
    assert {name: attribute.value for name, attribute in gate.attributes.items()} == given
    assert gate.inputs[0].name == "x"
    assert gate.inputs[2] is None
    assert gate.outputs[0].shape == ir.Shape(["frames", 3, 8, 8])


def test_a_table_is_not_laid_out():
    rows = np.zeros((64, 64), np.int64)
    model = graph(
        """g (float[1,64,64,16] x, float[8,16] table, int64[64,64] rows) => (float[1,64,64,16] y) {
        laid = Gather(table, rows) y = Add(x, laid) }""",
        table=data(8, 16), rows=rows,
    )  # fmt: skip
    simplify_structure(model)
    assert ops(model) == ["Gather", "Add"], "262 KB that are made of half a kilobyte"


def test_branches_keep_what_they_are_from():
    text = """g (bool c, float[2,3] x) => (float[2,3] y) {
        y = If(c) <then_branch = t () => (float[2,3] p) {
            s = Constant<value_ints=[3,2]>() u = Constant<value_ints=[2,3]>() a = Reshape(x, s) p = Reshape(a, u) },
            else_branch = e () => (float[2,3] q) { q = Neg(x) }>
    }"""
    model = graph(text)
    for node in model.graph.all_nodes():
        node.metadata_props[SCOPES] = str(node.outputs[0].name)
    before = run(model, c=np.array(True), x=data(2, 3))["y"]
    simplify_structure(model)
    np.testing.assert_array_equal(run(model, c=np.array(True), x=data(2, 3))["y"], before)
    assert all(node.metadata_props for node in model.graph.all_nodes())


def test_other_numbers_are_an_error(monkeypatch):
    def breaks(proto, **_):
        for node in proto.graph.node:
            node.op_type = "Sigmoid" if node.op_type == "Relu" else node.op_type
        return proto, True

    monkeypatch.setattr(onnxsim, "simplify", breaks)
    with pytest.raises(PassError, match="changed the model's numbers") as error:
        OnnxSimplifier()(marked(LONG, w=data(16, 32)))
    assert error.value.where == "y"


def test_the_same_bytes_twice():
    made = []
    for _ in range(2):
        model = marked(LONG, w=data(16, 32))
        simplify_structure(model)
        made.append(ir.to_proto(model).SerializeToString(deterministic=True))
    assert made[0] == made[1]
    onnx.checker.check_model(onnx.load_from_string(made[0]))


def test_what_hangs_on_a_shape_is_written_after():
    """The simplifier folds shapes, so a scatter would no longer wait for whoever reads the state."""
    order = [type(step) for step in PASSES.finishing()]
    assert order.index(OnnxSimplifier) < order.index(UpdateInPlace)
