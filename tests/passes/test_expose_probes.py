"""Decisions as outputs, and inputs in their place."""

from __future__ import annotations

import numpy as np
from graphs import check, data, graph, run, weights

from dvexport.passes.expose_probes import ExposeProbes, ForceDecisions

TEXT = """g (float[2,3,4,4] x, float[3,3,3,3] W, int64[2,3] own, bool[2,2,2] tiles) => (float[2,3,4,4] y) {
    action = Identity(own)
    u = dv.GatedConv<gate="a", pads=[1,1,1,1]>(x, W, , action, tiles)
    y = dv.GatedConv<gate="b", pads=[1,1,1,1]>(u, W, , action)
}"""


def feeds():
    rng = np.random.default_rng(0)
    return {"x": data(2, 3, 4, 4), "own": rng.integers(0, 3, (2, 3)), "tiles": rng.random((2, 2, 2)) < 0.5}


def test_probes_show_every_decision():
    model = graph(TEXT, W=weights(3, 3, 3))
    before = run(model, **feeds())["y"]
    ExposeProbes()(model)
    check(model)
    found = run(model, **feeds())
    np.testing.assert_array_equal(found["y"], before)
    np.testing.assert_array_equal(found["probe.a.tiles"], feeds()["tiles"])
    for gate in "ab":  # two gates share a decision: an output each
        np.testing.assert_array_equal(found[f"probe.{gate}.action"], feeds()["own"])
    assert set(found) == {"y", "probe.a.action", "probe.a.tiles", "probe.b.action"}


def test_forced_decisions_replace_and_probes_stay():
    model, other = graph(TEXT, W=weights(3, 3, 3)), graph(TEXT, W=weights(3, 3, 3))
    ExposeProbes()(model)
    ForceDecisions()(model)
    check(model)
    inputs = {value.name for value in model.graph.inputs}
    assert {"force.a.action", "force.a.tiles"} <= inputs
    everything = {"own": np.full((2, 3), 2), "tiles": np.ones((2, 2, 2), bool)}
    forced = {n: everything["own" if n.endswith("action") else "tiles"] for n in inputs if n.startswith("force.")}
    found = run(model, **feeds(), **forced)
    np.testing.assert_array_equal(found["y"], run(other, **{**feeds(), **everything})["y"])
    np.testing.assert_array_equal(found["probe.b.action"], feeds()["own"])


def test_nothing_to_expose():
    model = graph("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    assert not ExposeProbes()(model).modified
    assert not ForceDecisions()(model).modified
