"""Streams: memories become states, and a model that mixes frames is refused with the node that does it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphs import check, data, graph, ops, run, run_steps, weights
from torch import nn

from dvexport import gates
from dvexport.errors import TraceError
from dvexport.graph.state import states_of
from dvexport.models import zoo
from dvexport.passes.pipeline import Request
from dvexport.passes.set_frames import SetClip, SetStream
from dvexport.targets.onnx.passes import lower
from dvexport.trace import trace

CAUSAL = """g (float[frames,2,4,4] x, float[3,2,3,3] W, int64[frames,3] action, float[1,2,4,4] zeros)
    => (float[frames,3,4,4] y, float[frames,2] mean) {
    before = dv.Delay<name="before">(x, zeros)
    sum = Add(x, before)
    y = dv.GatedConv<gate="g", pads=[1,1,1,1]>(sum, W, , action)
    axes = Constant<value_ints=[2,3]>()
    v = ReduceMean<keepdims=0>(x, axes)
    mean = dv.FrameMean<name="consensus">(v)
}"""


def causal():
    return graph(CAUSAL, W=weights(3, 2, 3), zeros=np.zeros((1, 2, 4, 4), np.float32))


def feeds():
    return {"x": data(5, 2, 4, 4), "action": np.random.default_rng(1).integers(0, 3, (5, 3))}


def test_memories_become_states():
    model = causal()
    SetStream()(model)
    check(model)
    assert ops(model) == ["Add", "dv.GatedConv", "ReduceMean", "Add", "Add", "Div", "Identity"]
    assert {(s.name, s.shape) for s in states_of(model)} == {
        ("before", (1, 2, 4, 4)), ("g.history", (1, 3, 4, 4)), ("consensus.sum", (1, 2)), ("consensus.count", (1, 1)),
    }  # fmt: skip


def test_steps_give_the_clip():
    whole, stream = causal(), causal()
    SetStream()(stream)
    expected, found = run(whole, **feeds()), run_steps(stream, feeds())
    for name in ("y", "mean"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6)


def test_clip_fixes_every_shape():
    model = causal()
    expected = run(model, **feeds())
    SetClip(5)(model)
    check(model)
    assert all(v.shape[0] == 5 for v in model.graph.outputs)
    assert "frames" not in {str(d) for node in model.graph for v in node.outputs for d in v.shape}
    np.testing.assert_allclose(run(model, **feeds())["y"], expected["y"], atol=1e-6)
    assert states_of(model) == []


def test_clip_fixes_shapes_that_compute_with_the_frames():
    """As of a bidirectional shift, which joins the frames but the last and a frame of zeros."""
    model = lower(trace(zoo.create("tsm_resnet18", width=0.125, size=32, frames=3, classes=3), (32, 32)),
                  Request(mode="clip", frames=3)).model  # fmt: skip
    shapes = [value.shape for node in model.graph for value in node.outputs if value.shape is not None]
    assert all(isinstance(dim, int) for shape in shapes for dim in shape)


def test_delay_must_start_at_zero():
    model = graph(CAUSAL, W=weights(3, 2, 3), zeros=np.ones((1, 2, 4, 4), np.float32))
    with pytest.raises(TraceError, match="states start as zeros"):
        SetStream()(model)


class Mixing(nn.Module):
    """A convolution, and a head of one's own."""

    def __init__(self, mix):
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 4, 3, 2), mix

    def forward(self, frames):
        return self.mix(self.conv(frames).mean((2, 3)))


MIXING = {
    "mean": lambda v: v - v.mean(0, keepdim=True),
    "flip": lambda v: v.flip(0),
    "next frame": lambda v: torch.cat([v[1:], torch.zeros_like(v[:1])]),
    "frame before, not by delay": lambda v: torch.cat([torch.zeros_like(v[:1]), v[:-1]]),
    "attention": lambda v: torch.softmax(v @ v.T, -1) @ v,
    "softmax over frames": lambda v: torch.softmax(v, 0),
    "sum over frames": lambda v: torch.cumsum(v, 0),
    "maximum": lambda v: torch.maximum(v, v.amax(0, keepdim=True)),
    "sorted": lambda v: torch.sort(v, dim=0)[0],
    "rolled": lambda v: torch.roll(v, 1, 0),
    "first frame": lambda v: v + v[:1],
    "frame number": lambda v: v + torch.arange(v.shape[0]).to(v.dtype)[:, None],
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_refused(name):
    traced = trace(Mixing(MIXING[name]), (16, 16))
    with pytest.raises(TraceError, match="can't run in stream mode: a node") as error:
        SetStream()(traced)
    assert "node '" in error.value.where
    assert "--mode clip" in error.value.hint


CAUSAL_HEADS = {
    "delay": lambda v: v + gates.delay(v, name="d"),
    "mean": lambda v: gates.frame_mean(v),
    "per frame": lambda v: torch.softmax(v, 1) * v.flip(1) + v.cumsum(1),
    "reshaped": lambda v: v.reshape(-1, 2, 2).transpose(1, 2).reshape(-1, 4).sort(dim=1)[0],
    "split and joined": lambda v: torch.cat([v[:, 2:], gates.delay(v[:, :2], name="d")], 1),
    "zeros": lambda v: v + torch.zeros_like(v) + torch.ones(v.shape[0], 4),
    "channels picked": lambda v: v.index_select(1, torch.tensor([3, 0, 0, 1])),
}


@pytest.mark.parametrize("name", CAUSAL_HEADS)
def test_causal_is_accepted(name):
    net, frames = Mixing(CAUSAL_HEADS[name]).eval(), data(4, 3, 16, 16)
    with torch.no_grad():
        expected = net(torch.from_numpy(frames)).numpy()
    model = lower(trace(net, (16, 16)), Request(), check=True).model
    np.testing.assert_allclose(run_steps(model, {"frames": frames})["logits"], expected, atol=1e-5)


def test_bidirectional_shift_is_refused_by_node_and_module():
    net = zoo.create("tsm_resnet18", width=0.125, size=(32, 32), classes=5)
    with pytest.raises(TraceError, match="reads the frame ahead") as error:
        SetStream()(trace(net, (32, 32)))
    assert "Slice node" in error.value.where
    assert "layer1.0" in error.value.where
    assert "online variant" in error.value.hint


def test_online_shift_is_accepted():
    model = trace(zoo.create("tsm_online_resnet18", width=0.125, size=(32, 32), classes=5), (32, 32))
    SetStream()(model)
    check(model)
    assert len(states_of(model)) == 8 + 2  # a shift a block, sum and count of the consensus


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("d", 'a = dv.Delay<name="d">(x, z) b = Neg(x) c = dv.Delay<name="d">(b, z) y = Add(a, c)'),
        ("g.history", 'a = dv.GatedConv<gate="g">(x, W, , t) y = dv.GatedConv<gate="g">(a, W, , t)'),
    ],
)
def test_states_need_names_of_their_own(name, body):
    model = graph(
        f"""g (float[frames,2,4,4] x, float[2,2,1,1] W, float[1,2,4,4] z, int64[frames,2] t)
        => (float[frames,2,4,4] y) {{ {body} }}""",
        W=weights(2, 2, 1), z=np.zeros((1, 2, 4, 4), np.float32),
    )  # fmt: skip
    with pytest.raises(TraceError, match=f"two states are called '{name}'"):
        SetStream()(model)
