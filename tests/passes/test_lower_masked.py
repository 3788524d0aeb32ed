"""Every operator becomes its reference."""

from __future__ import annotations

import numpy as np
from graphs import check, data, graph, run, weights

from dvexport.passes.lower_masked import LowerMasked

TEXT = """g (float[3,3,7,5] x, float[4,3,3,3] W, int64[3,4] action, bool[3,3,2] tiles, float[1,3,7,5] zeros)
    => (float[3,4,7,5] y, float[3,4] mean) {
    before = dv.Delay<name="d">(x, zeros)
    u = dv.GatedConv<gate="g", pads=[1,1,1,1]>(before, W, , action, tiles)
    rows = dv.ToRows(u)
    y = dv.FromRows<size=[7,5]>(rows)
    axes = Constant<value_ints=[2,3]>()
    v = ReduceMean<keepdims=0>(y, axes)
    mean = dv.FrameMean<name="m">(v)
}"""


def test_standard_operators_only():
    model = graph(TEXT, W=weights(4, 3, 3), zeros=np.zeros((1, 3, 7, 5), np.float32))
    rng = np.random.default_rng(0)
    feeds = {"x": data(3, 3, 7, 5), "action": rng.integers(0, 3, (3, 4)), "tiles": rng.random((3, 3, 2)) < 0.5}
    before = run(model, **feeds)
    assert LowerMasked()(model).modified
    check(model)
    assert {node.domain for node in model.graph} == {""}
    for name, value in run(model, **feeds).items():
        np.testing.assert_array_equal(value, before[name])
    assert not LowerMasked()(model).modified
