"""Kinds of units: what is declared, who writes them, which values are images, and in what order units run."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dvexport.dialect.spec import OPERATORS, specification
from dvexport.errors import PassError
from dvexport.targets import roles
from dvexport.targets.tvm.calls.write import WRITERS
from dvexport.targets.tvm.passes import KERNELS
from dvexport.targets.tvm.units.catalogue import ISLAND, KINDS, MATCHED, SERVING
from dvexport.targets.tvm.units.cut import cut, find_units
from dvexport.targets.tvm.units.kinds import Role
from dvexport.targets.tvm.units.levels import levels_of


def model(body: str, given: str = "float[1, 8, 6, 6] x", made: str = "float[1, 8, 6, 6] y") -> ir.Model:
    """A model whose values are images of one size unless a line says otherwise."""
    made_of = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> g ({given}) => ({made}) {{ {body} }}')
    for node in made_of.graph:
        for value in node.outputs:
            if value.shape is None:
                value.shape, value.dtype = ir.Shape([1, 8, 6, 6]), ir.DataType.FLOAT
    return made_of


def test_every_kind_has_a_writer_and_no_writer_is_for_another():
    assert set(WRITERS) == {kind.name for kind in (*MATCHED, ISLAND)}


def test_kinds_are_declared_once():
    names = [kind.name for kind in (*MATCHED, ISLAND, *SERVING)]
    assert len(set(names)) == len(names) == len(KINDS)
    assert not KINDS.keys() & {op for ops in roles.ROLES.values() for op in ops}


def test_every_operator_with_a_kernel_starts_a_unit():
    ours = {op.removeprefix("dv.") for kind in MATCHED for op in kind.ops if op.startswith("dv.")}
    assert ours == set(KERNELS) <= OPERATORS.keys()


def test_roles_are_those_of_profiles():
    assert set(Role) <= {*roles.ROLES, "other"}


def test_a_specification_is_asked_of_dialect_nodes_alone():
    (node,) = model("y = Relu (x)").graph
    with pytest.raises(PassError, match="Relu is no operator of the dialect"):
        specification(node)


def test_another_domains_operator_is_not_fused():
    """A sum after a linear layer was taken for a bias whatever its domain."""
    found = {}
    for domain in ("", "other"):
        made = model("p = MatMul (x, w) y = Add (p, b)", "float[32, 4] x", "float[32, 4] y")
        for name, shape in (("w", (4, 4)), ("b", (4,))):
            value = next(v for node in made.graph for v in node.inputs if v is not None and v.name == name)
            value.const_value = ir.tensor(np.ones(shape, np.float32))
            value.shape, value.dtype = ir.Shape(shape), ir.DataType.FLOAT
        product, add = made.graph
        product.outputs[0].shape, add.domain = ir.Shape([32, 4]), domain
        (unit,) = find_units(made)
        found[domain] = [node.op_type for node in unit.nodes]
    assert found == {"": ["MatMul", "Add"], "other": ["MatMul"]}


def test_a_mean_over_cells_is_an_image_that_units_may_read_though_it_is_held_flat():
    units = find_units(model("m = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (x) y = Relu (m)"))
    assert [unit.kind for unit in units] == ["avg_pool", "relu"]
    assert not KINDS["avg_pool"].planar
    assert KINDS["relu"].planar


def test_islands_run_after_the_units_they_read_and_before_those_that_read_them():
    made = model("a = Relu (x) b = Sigmoid (a) c = Exp (x) d = Relu (b) y = Mul (d, c)")
    units = cut(made)
    kinds = [(unit.kind, [node.outputs[0].name for node in unit.nodes]) for unit in units]
    assert kinds == [("island", ["c"]), ("relu", ["a"]), ("island", ["b", "d", "y"])]
    levels = levels_of(made, find_units(made))
    assert {node.outputs[0].name: level for node, level in levels.level.items()} == {
        "a": 1, "b": 1, "c": 0, "d": 1, "y": 1,
    }  # fmt: skip
