"""Tracing: what a torch model becomes, and the errors of one that can't be traced."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graphs import check, ops, run
from oracle_check import net_of, traced, video
from torch import nn

from dvexport import gates
from dvexport.errors import TraceError, UsageError
from dvexport.trace import trace


@pytest.mark.parametrize("kind", ["dstep", "adafuse", "chained"])
def test_gate_level_graph(kind):
    model = traced(kind, "uneven")
    check(model)
    names = ops(model)
    assert names.count("dv.GatedConv") == 6
    assert names.count("dv.Delay") == 3
    assert names.count("dv.FrameMean") == 1
    assert "BatchNormalization" not in names
    gated = [node for node in model.graph if node.op_type == "GatedConv"]
    assert all(str(node.outputs[0].shape[0]) == "frames" for node in gated)
    assert all(isinstance(d, int) for node in gated for d in node.outputs[0].shape[1:])


@pytest.mark.parametrize("frames", [1, 2, 6])
def test_any_number_of_frames(frames):
    net, clip = net_of("dstep", "uneven"), video("uneven")[:frames]
    with torch.no_grad():
        expected = net(torch.from_numpy(clip)).numpy()
    found = run(traced("dstep", "uneven"), frames=clip)["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


class Head(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), head

    def forward(self, frames):
        return self.head(self, frames)


def branches(net, frames):
    return frames.mean((2, 3)) if frames.sum() > 0 else frames.amax((2, 3))


def foreign(net, frames):
    return torch.special.bessel_j0(frames).mean((2, 3))


DEPENDS = "a Python branch or a size depends on a tensor's values"


@pytest.mark.parametrize(
    ("head", "what", "place"),
    [
        (branches, DEPENDS, rf"Head, test_trace\.py line {branches.__code__.co_firstlineno + 1}"),
        (foreign, "ONNX has no operator for torch's 'bessel_j0'", "Head"),
    ],
)
def test_what_cannot_be_traced_is_told_in_a_line_with_its_place(head, what, place, capfd):
    with pytest.raises(TraceError) as error:
        trace(Head(head), (8, 8))
    assert error.value.what == what
    assert re.fullmatch(place, error.value.where)
    assert len(str(error.value).splitlines()) <= 4
    assert capfd.readouterr() == ("", "")  # where torch prints its graph


def test_what_the_exporter_drops_is_refused():
    def pooled(net, frames, **options):
        return F.avg_pool2d(net.conv(frames), 2, **options).flatten(1)

    with pytest.raises(TraceError, match="divisor_override=3"):
        trace(Head(partial(pooled, divisor_override=3)), (8, 8))
    assert "AveragePool" in ops(trace(Head(pooled), (8, 8)))


def wrong_activation(net, frames):
    return gates.gated_conv(frames, net.conv, gate="mine", activation="gelu").mean((2, 3))


def test_the_refusal_of_a_gate_is_not_wrapped():
    with pytest.raises(UsageError, match="activation 'gelu'") as caught:
        trace(Head(wrong_activation), (8, 8))
    assert caught.value.where == "gate mine" and "none, relu" in caught.value.hint


def test_tracing_leaves_the_model_in_eval_mode():
    net = Head(lambda self, frames: self.conv(frames).mean((2, 3)))
    trace(net.train(), (8, 8))
    assert not net.training
