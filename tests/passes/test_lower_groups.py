"""Group lowering of a single convolution: a conditional a group, constant weights inside."""

from __future__ import annotations

import pytest
from graphs import ops
from sparse import lowers

from dvexport.passes.lower_groups import LowerGroups

ARGUMENTS = [
    "rows",
    "rows, , , , base",
    "rows, tiles, , , base",
    ", , active_in",
    ", tiles, active_in, residual, base",
    ", , , residual",
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_agrees(arguments, activation):
    model = lowers(LowerGroups(), "groups", arguments, activation=activation)
    gated = "rows" in arguments or "active_in" in arguments
    assert ops(model).count("If") == (2 if gated else 0)
    weights = [v for g in model.graph.subgraphs() for n in g if n.op_type == "Conv" for v in n.inputs[1:2]]
    assert all(v.producer().op_type == "Constant" for v in weights)
