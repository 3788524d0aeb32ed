"""A kind of gate that the passes have never heard of: two operators, one lowering, and no pass is changed."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import check, data, graph, node_of, ops, run, weights

from dvexport.decisions import ACTION
from dvexport.dialect.masks import channel_mask
from dvexport.dialect.merge import merge
from dvexport.dialect.spec import OPERATORS, Operator
from dvexport.graph.match import is_op
from dvexport.passes.choose_kernels import ChooseKernels
from dvexport.passes.choose_lowering import ChooseLowering
from dvexport.passes.group_channels import ChannelStatistics, GroupChannels
from dvexport.passes.lowerings import LOWERINGS, Abilities, Lowering
from dvexport.passes.propagate_inactive import PropagateInactive
from dvexport.passes.set_frames import SetClip
from dvexport.passes.split_paths import SplitPaths

T, C = 3, 32


@pytest.fixture(autouse=True)
def scales():
    """`dv.GatedScale`, a scale for each channel under a gate, and `dv.PartScale`, which recomputes a part of it."""
    known = dict(OPERATORS)

    class PartScale(Operator):
        name = "PartScale"
        inputs = ("X", "W", "rows?", "tiles?", "base?")
        outputs = ("Y",)
        attributes = {"gate": None}  # noqa: RUF012

        def reference(self, build, inputs, attributes):
            y = build.op("Mul", inputs["X"], inputs["W"])
            if inputs["rows"] is not None:
                base = inputs["base"] or build.const(np.float32(0))
                y = build.op("Where", channel_mask(build, inputs["rows"]), y, base)
            return [y]

    class GatedScale(Operator):
        name = "GatedScale"
        inputs = ("X", "W", "action?", "tiles?")
        outputs = ("U",)
        attributes = {"gate": None}  # noqa: RUF012
        decisions = {ACTION.name: "action"}  # noqa: RUF012
        part = "PartScale"
        output_channels = {"X": 1, "W": 1, "action": 1}  # noqa: RUF012

        def reference(self, build, inputs, attributes):
            v = build.op("Mul", inputs["X"], inputs["W"], shape=list(inputs["X"].shape), dtype=inputs["X"].dtype)
            first = build.const(np.zeros((1, *v.shape[1:]), np.float32))
            joined = build.op("Concat", first, v, axis=0)
            history = build.op("Slice", joined, build.ints(0), build.ints(-1), build.ints(0))
            return [merge(build, v, history, inputs["action"], inputs["tiles"])]

    yield
    for name in OPERATORS.keys() - known.keys():
        del OPERATORS[name]


def model_of(tail="y = Conv(u, R)", frames=T):
    model = graph(
        f"""g (float[{frames},32,4,4] x, float[1,32,1,1] W, float[5,32,1,1] R, int64[{frames},32] a)
        => (float[{frames},c,4,4] y) {{ u = dv.GatedScale<gate="s">(x, W, a) {tail} }}""",
        W=data(1, C, 1, 1), R=weights(5, C, 1),
    )  # fmt: skip
    return model, {"x": data(frames, C, 4, 4), "a": np.random.default_rng(1).integers(0, 3, (frames, C))}


def test_no_lowering_serves_it_until_one_does(monkeypatch):
    model, _ = model_of()
    chosen = ChooseLowering(Abilities())
    chosen(model)
    assert [(c.gate, c.lowering) for c in chosen.choices] == [("s", "masked")]
    assert "GatedScale" in chosen.choices[0].reason

    class Scales(Lowering):
        parts = ("PartScale",)

    monkeypatch.setitem(LOWERINGS, "scales", Scales("scales"))
    chosen = ChooseLowering(Abilities(), overrides={"s": "scales"})
    chosen(model)
    assert [(c.gate, c.lowering) for c in chosen.choices] == [("s", "scales")]
    assert Scales("scales").why_not([node_of(model, "GatedScale")], Abilities()) is None


def test_it_is_split_into_its_part():
    model, feeds = model_of()
    before = run(model, **feeds)["y"]
    SetClip(T)(model)
    ChooseKernels()(model)
    assert SplitPaths()(model).modified
    check(model)
    assert [op for op in ops(model) if op.startswith("dv.")] == ["dv.PartScale", "dv.Delay", "dv.Merge"]
    np.testing.assert_allclose(run(model, **feeds)["y"], before, atol=1e-5)


def test_its_readers_are_promised_zeros_and_reordered_with_it():
    model, feeds = model_of(frames=1)
    before = run(model, **feeds)["y"]
    assert PropagateInactive()(model).modified
    reader = node_of(model, "GatedConv")
    assert is_op(OPERATORS["GatedConv"].bind(reader)["active_in"].producer(), "Not")
    for node in (reader, node_of(model, "GatedScale")):
        node.metadata_props["dv.lowering"] = "groups"
    seen = np.random.default_rng(0).integers(0, 3, (20, C))
    seen[:, ::3], seen[:, 1::3] = 2, 0
    assert GroupChannels({"s": ChannelStatistics(seen)})(model).modified
    check(model)
    assert not np.array_equal(node_of(model, "GatedScale").inputs[1].const_value.numpy(), data(1, C, 1, 1))
    np.testing.assert_allclose(run(model, **feeds)["y"], before, atol=1e-5)
