"""The whole table of passes on models of the zoo."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphs import data, run, run_steps
from oracle_check import traced

from dvexport.errors import PassError, UsageError
from dvexport.graph.state import states_of
from dvexport.models import zoo
from dvexport.passes.pipeline import Request
from dvexport.targets.onnx import passes
from dvexport.targets.onnx.passes import lower
from dvexport.trace import trace

MODELS = ["dstep_resnet18", "adafuse_resnet18", "dstep_paper_resnet18"]


@cache
def zoo_model(name):
    torch.manual_seed(0)
    net = zoo.create(name, width=0.25, size=(64, 64), classes=7, hidden=32)
    return net, trace(net, (64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["stream", "clip"])
def test_zoo(name, mode):
    net, model = zoo_model(name)
    frames = data(3, 3, 64, 64)
    with torch.no_grad():
        expected = net(torch.from_numpy(frames)).numpy()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    done = lower(model, Request(mode=mode, frames=3), check=True)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    found = run_steps(done.model, {"frames": frames}) if mode == "stream" else run(done.model, frames=frames)
    np.testing.assert_allclose(found["logits"], expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
    assert {node.domain for node in done.model.graph} == {""}
    assert len(done.choices) == 8
    assert done.log[0].name == "Simplify"
    assert done.log[-1].name == "CheckDialect"


def test_dense_variant_has_plain_operators_only():
    done = lower(traced("dstep", "even"), Request(mode="clip", frames=2, variant="dense"), check=True)
    names = {node.op_type for node in done.model.graph}
    network = {"Conv", "Relu", "Add", "ReduceMean", "Reshape", "Gemm", "Concat", "Identity"}
    consensus = {"MatMul"}
    assert names <= network | consensus
    assert sum(node.op_type == "Conv" for node in done.model.graph) == 1 + 3 * 2 + 2
    assert done.choices == []
    assert [value.name for value in done.model.graph.outputs] == ["logits"]


def test_dense_stream_keeps_only_the_consensus():
    done = lower(traced("dstep", "even"), Request(variant="dense"), check=True)
    assert {state.name for state in states_of(done.model)} == {"consensus.sum", "consensus.count"}


def test_masked_variant_agrees():
    frames = data(4, 3, 32, 32)
    outputs = []
    for variant in ("masked", "gated"):
        model = lower(traced("dstep", "even"), Request(mode="clip", frames=4, variant=variant), check=True).model
        outputs.append(run(model, frames=frames))
    np.testing.assert_allclose(outputs[0]["logits"], outputs[1]["logits"], atol=1e-5)
    np.testing.assert_array_equal(outputs[0]["probe.layer2.0.tiles"], outputs[1]["probe.layer2.0.tiles"])


class Breaks(ir.passes.InPlacePass):
    def call(self, model):
        raise RuntimeError("as asked")


def test_a_failing_pass_is_named(monkeypatch):
    monkeypatch.setattr(passes, "KeepRows", Breaks)
    with pytest.raises(PassError, match="pass Breaks failed") as error:
        lower(traced("dstep", "even"), Request())
    assert error.value.why == "as asked"
    assert "SplitPaths" in error.value.hint


def test_an_error_of_the_user_s_says_in_which_pass():
    with pytest.raises(UsageError, match="unknown gate") as error:
        lower(traced("dstep", "even"), Request(overrides={"layer9": "tiles"}))
    assert any("in pass ChooseLowering, after Simplify" in note for note in error.value.__notes__)


@pytest.mark.parametrize("wrong", [{"mode": "steam"}, {"variant": "dens"}], ids=str)
def test_a_plan_refuses_what_it_does_not_know(wrong):
    with pytest.raises(UsageError, match=r"did you mean (stream|dense)"):
        Request(**wrong)
