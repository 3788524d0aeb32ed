"""Streams: memories become states, and a model that mixes frames is refused with the node that does it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import check, data, graph, ops, run, run_steps, weights

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


@pytest.fixture(scope="module")
def shifted() -> ir.Model:
    """Traced, with a bidirectional shift, which joins the frames but the last and a frame of zeros."""
    return trace(zoo.create("tsm_resnet18", width=0.125, size=32, frames=3, classes=3), (32, 32))


def test_clip_fixes_shapes_that_compute_with_the_frames(shifted):
    model = lower(shifted, Request(mode="clip", frames=3)).model
    shapes = [value.shape for node in model.graph for value in node.outputs if value.shape is not None]
    assert all(isinstance(dim, int) for shape in shapes for dim in shape)


def test_delay_must_start_at_zero():
    model = graph(CAUSAL, W=weights(3, 2, 3), zeros=np.ones((1, 2, 4, 4), np.float32))
    with pytest.raises(TraceError, match="states start as zeros"):
        SetStream()(model)


MIXING = {
    "mean": ("ReduceMean", "zero = Constant<value_ints=[0]>() m = ReduceMean<keepdims=1>(v, zero) y = Sub(v, m)"),
    "flip": ("Slice", """back = Constant<value_ints=[-1]>() end = Constant<value_ints=[-9223372036854775808]>()
        zero = Constant<value_ints=[0]>() y = Slice(v, back, end, zero, back)"""),
    "next frame": ("Slice", """one = Constant<value_ints=[1]>() end = Constant<value_ints=[9223372036854775807]>()
        zero = Constant<value_ints=[0]>() s = Slice(v, one, end, zero, one) y = Concat<axis=0>(s, z)"""),
    "frame before, not by delay": ("Slice", """zero = Constant<value_ints=[0]>() end = Constant<value_ints=[-1]>()
        s = Slice(v, zero, end, zero) y = Concat<axis=0>(z, s)"""),
    "attention": ("MatMul", """t = Transpose<perm=[1,0]>(v) a = MatMul(v, t) b = Softmax<axis=-1>(a)
        y = MatMul(b, v)"""),
    "softmax over frames": ("Softmax", "y = Softmax<axis=0>(v)"),
    "sum over frames": ("CumSum", "zero = Constant<value_int=0>() y = CumSum(v, zero)"),
    "maximum": ("ReduceMax", "zero = Constant<value_ints=[0]>() m = ReduceMax<keepdims=1>(v, zero) y = Max(v, m)"),
    "sorted": ("TopK", "n = Shape<start=0,end=1>(v) y, order = TopK<axis=0,largest=0>(v, n)"),
    "rolled": ("Slice", """zero = Constant<value_ints=[0]>() n = Shape<start=0,end=1>(v)
        last = Constant<value_ints=[-1]>() at = Mod(last, n) a = Slice(v, zero, at, zero)
        b = Slice(v, at, n, zero) y = Concat<axis=0>(b, a)"""),
    "first frame": ("Slice", """zero = Constant<value_ints=[0]>() one = Constant<value_ints=[1]>()
        first = Slice(v, zero, one, zero) y = Add(v, first)"""),
    "frame number": ("Range", """zero = Constant<value_int=0>() one = Constant<value_int=1>()
        shape = Shape<start=0,end=1>(v) n = Squeeze(shape) r = Range(zero, n, one) c = Cast<to=1>(r)
        axis = Constant<value_ints=[1]>() u = Unsqueeze(c, axis) y = Add(v, u)"""),
}  # fmt: skip
"""The node that is refused, and the graph, as the exporter writes it."""
TOLD = {
    "r": ("frames",), "c": ("frames",), "u": ("frames", 1), "s": ("frames - 1", 4),
    "p": ("frames", 2, 2), "q": ("frames", 2, 2), "w": ("frames", 4), "order": ("frames", 4),
}  # fmt: skip
"""Shapes that a trace tells and ONNX does not infer."""


def head(body: str) -> ir.Model:
    """What a model may do with a vector of each frame."""
    zeros = {name: np.zeros((1, size), np.float32) for name, size in (("z", 4), ("half", 2))}
    text = f"g (float[frames,4] v, float[1,4] z, float[1,2] half) => (float[frames,4] y) {{ {body} }}"
    model = graph(text, **zeros)
    for node in model.graph:
        for value in node.outputs:
            if value.name in TOLD:
                value.shape = ir.Shape(TOLD[value.name])
    return model


@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_refused(name):
    operator, body = MIXING[name]
    with pytest.raises(TraceError, match="can't run in stream mode: a node") as error:
        SetStream()(head(body))
    assert f"{operator} node '" in error.value.where
    assert "--mode clip" in error.value.hint


CAUSAL_HEADS = {
    "delay": """d = dv.Delay<name="d">(v, z) y = Add(v, d)""",
    "mean": """y = dv.FrameMean<name="consensus">(v)""",
    "per frame": """a = Softmax<axis=1>(v) back = Constant<value_ints=[-1]>() one = Constant<value_ints=[1]>()
        end = Constant<value_ints=[-9223372036854775808]>() b = Slice(v, back, end, one, back) m = Mul(a, b)
        axis = Constant<value_int=1>() e = CumSum(v, axis) y = Add(m, e)""",
    "reshaped": """f = Constant<value_ints=[-1,2,2]>() p = Reshape(v, f) q = Transpose<perm=[0,2,1]>(p)
        g = Constant<value_ints=[-1,4]>() w = Reshape(q, g) n = Constant<value_ints=[4]>()
        y, order = TopK<axis=1,largest=0>(w, n)""",
    "split and joined": """zero = Constant<value_ints=[0]>() two = Constant<value_ints=[2]>()
        one = Constant<value_ints=[1]>() four = Constant<value_ints=[4]>() a = Slice(v, two, four, one, one)
        b = Slice(v, zero, two, one, one) d = dv.Delay<name="d">(b, half) y = Concat<axis=1>(a, d)""",
    "zeros": """n = Shape(v) zero = Constant<value_float=0.0>() a = Expand(zero, n) b = Add(v, a)
        t = Shape<start=0,end=1>(v) four = Constant<value_ints=[4]>() shape = Concat<axis=0>(t, four)
        one = Constant<value_float=1.0>() e = Expand(one, shape) y = Add(b, e)""",
    "channels picked": "at = Constant<value_ints=[3,0,0,1]>() y = Gather<axis=1>(v, at)",
}


@pytest.mark.parametrize("name", CAUSAL_HEADS)
def test_causal_is_accepted(name):
    """And its steps give what its clip gives."""
    whole, stream, feeds = head(CAUSAL_HEADS[name]), head(CAUSAL_HEADS[name]), {"v": data(4, 4)}
    SetStream()(stream)
    check(stream)
    np.testing.assert_allclose(run_steps(stream, feeds)["y"], run(whole, **feeds)["y"], atol=1e-6)


def test_bidirectional_shift_is_refused_by_node_and_module(shifted):
    with pytest.raises(TraceError, match="reads the frame ahead") as error:
        SetStream()(shifted.clone())
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
