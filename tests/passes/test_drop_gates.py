"""The dense model of the same weights."""

from __future__ import annotations

import numpy as np
from graphs import check, data, graph, node_of, run, weights

from dvexport.graph.state import states_of
from dvexport.passes.drop_gates import DropGates
from dvexport.passes.set_frames import SetStream

TEXT = """g (float[frames,3,4,4] x, float[3,3,3,3] W, int64[frames,3] action, bool[frames,2,2] tiles)
    => (float[frames,3,4,4] y) { y = dv.GatedConv<gate="a", pads=[1,1,1,1]>(x, W, , action, tiles) }"""


def test_everything_is_computed():
    model, whole = (graph(TEXT, W=weights(3, 3, 3)) for _ in range(2))
    SetStream()(model)
    assert DropGates()(model).modified
    check(model)
    assert states_of(model) == []
    assert [v.name for v in node_of(model, "GatedConv").inputs if v is not None] == ["x", "W"]
    x = data(1, 3, 4, 4)
    rest = {"action": np.zeros((1, 3), np.int64), "tiles": np.zeros((1, 2, 2), bool)}
    full = {"action": np.full((1, 3), 2), "tiles": np.ones((1, 2, 2), bool)}
    np.testing.assert_allclose(run(model, x=x, **rest)["y"], run(whole, x=x, **full)["y"], atol=1e-6)
    assert not DropGates()(graph("g (float[2] x) => (float[2] y) { y = Relu(x) }")).modified
