"""Rows are carried through what works on them, and nothing else is touched."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import check, data, graph, infer, ops, run, run_steps, weights

from dvexport.dialect import OPERATORS
from dvexport.graph.state import add_state, state_input, states_of
from dvexport.passes.tiles.keep_rows import KeepRows


def keep(body, frames=2, output="float[n,c,h,w] y"):
    model = graph(
        f"""g (float[{frames},4,6,8] x, float[{frames},4,6,8] other, float[5,4,1,1] P, float[5,4,3,3] W, float[5] B,
            float[1,4,6,8] zeros) => ({output}) {{ r = dv.ToRows(x) p = dv.FromRows<size=[6,8]>(r) {body} }}""",
        P=weights(5, 4, 1), W=weights(5, 4, 3), B=data(5), zeros=np.zeros((1, 4, 6, 8), np.float32),
    )  # fmt: skip
    model.graph.outputs[0].shape = None
    infer(model)
    inferred = model.clone()
    feeds = {"x": data(frames, 4, 6, 8), "other": data(frames, 4, 6, 8, seed=1)}
    expected = run(inferred, **feeds)["y"]
    model.graph.outputs[0].shape = type(model.graph.inputs[0].shape)(expected.shape)
    modified = KeepRows()(model).modified
    check(model)
    np.testing.assert_allclose(run(model, **feeds)["y"], expected, atol=1e-5)
    return [name for name in ops(model) if name != "Identity"], modified


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize(
    ("body", "standard"),
    [
        ("y = Relu(p)", ["Relu"]),
        ("y = Add(p, p)", ["Add"]),
        ("y = Conv(p, P, B)", ["Gather", "MatMul", "Add", "Concat"]),
        ("y = Conv<strides=[2,2]>(p, P)", ["Gather", "MatMul", "Concat"]),
        ('y = dv.Delay<name="d">(p, zeros)', ["Gather"]),
    ],
)
def test_stays_in_rows(frames, body, standard):
    names, _ = keep(body, frames)
    assert [name for name in names if "dv." not in name] == standard
    assert names[-1] == "dv.FromRows"


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize(
    "body",
    [
        "axes = Constant<value_ints=[2,3]>() y = ReduceMean(p, axes)",
        "axes = Constant<value_ints=[-1,-2]>() y = ReduceMean<keepdims=0>(p, axes)",
        "y = GlobalAveragePool(p)",
        "y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(p)",
        "y = AveragePool<kernel_shape=[3,2], strides=[1,2]>(p)",
    ],
)
def test_pooling_reads_rows(frames, body):
    output = "float[n,c] y" if "keepdims" in body else "float[n,c,h,w] y"
    names, _ = keep(body, frames, output)
    assert ("Gather" if "AveragePool" in body and "Global" not in body else "MatMul") in names
    assert not {"GlobalAveragePool", "AveragePool"} & set(names)
    pooled = int("y = AveragePool" in body)  # a smaller plane of rows, which the output reads here
    assert names.count("dv.FromRows") == 1 + pooled  # the one that was there, for nobody


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ("y = Sigmoid(p)", "Sigmoid"),
        ("y = MaxPool<kernel_shape=[2,2]>(p)", "MaxPool"),
        ("y = Conv<pads=[1,1,1,1]>(p, W)", "Conv"),
        ("y = Conv<pads=[1,1,1,1]>(p, P)", "Conv"),
        ("axes = Constant<value_ints=[1]>() y = ReduceMean(p, axes)", "ReduceMean"),
        ("y = AveragePool<kernel_shape=[2,2], pads=[1,1,1,1]>(p)", "AveragePool"),
        ("axes = Constant<value_ints=[2,3]>() m = ReduceMean(other, axes) y = Add(p, m)", "ReduceMean"),
    ],
)
def test_others_read_the_plane(body, kept):
    names, _ = keep(body)
    assert kept in names
    assert names[:2] == ["dv.ToRows", "dv.FromRows"]
    assert "MatMul" not in names


def test_round_trips_cancel():
    names, modified = keep("q = dv.ToRows(p) z = Neg(q) y = dv.FromRows<size=[6,8]>(z)")
    assert modified
    assert names.count("dv.ToRows") == 1


def stream(reader):
    """A state of a plane that starts and ends as rows."""
    model = graph(
        f"g (float[1,4,6,8] x) => (float[1,4,6,8] y) {{ r = dv.ToRows(x) v = dv.FromRows<size=[6,8]>(r) y = {reader} }}"
    )
    read = state_input(model, "s", model.graph.inputs[0])
    last = list(model.graph)[-1]
    if reader.startswith("dv"):
        to_rows = ir.Node("dv", "ToRows", [read])
        OPERATORS["ToRows"].infer(to_rows)
        model.graph.insert_before(last, to_rows)
        last.replace_input_with(0, to_rows.outputs[0])
    else:
        last.replace_input_with(0, read)
    v = next(node.outputs[0] for node in model.graph if node.op_type == "FromRows")
    add_state(model, "s", read, v)
    return model


@pytest.mark.parametrize(("reader", "shape"), [("dv.FromRows<size=[6,8]>(r)", (49, 4)), ("Neg(v)", (1, 4, 6, 8))])
def test_a_state_is_kept_as_rows_if_all_its_readers_want_rows(reader, shape):
    model, x = stream(reader), data(3, 4, 6, 8)
    expected = run_steps(model, {"x": x})["y"]
    KeepRows()(model)
    check(model)
    assert [state.shape for state in states_of(model)] == [shape]
    np.testing.assert_allclose(run_steps(model, {"x": x})["y"], expected, atol=1e-6)
