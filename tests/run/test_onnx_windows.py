"""What the onnx backend makes of attention: windows in a loop, biases of keys as columns. The numbers stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import data, graph, node_of, ops, run

from dvexport.graph.graph import static_shape
from dvexport.targets.onnx.rewrites import windows
from dvexport.targets.onnx.rewrites.key_biases import FoldKeyBiases
from dvexport.targets.onnx.rewrites.windows import LoopWindows

WINDOWS, PLACES, HEADS, DEPTH = 6, 8, 2, 4
TOKENS, CHANNELS = WINDOWS * PLACES, HEADS * DEPTH
SWIN = f"""g (float[1, {TOKENS}, {3 * CHANNELS}] rows, int64[{TOKENS}] order, int64[{TOKENS}] back,
  float[{HEADS}, {PLACES}, {PLACES}] bias, float[2, 1, {PLACES}, {PLACES}] masks, int64[{WINDOWS}] which,
  float[{WINDOWS}, 1, 1, {PLACES}] dropped, float[] scale, int64[4] heads, int64[3] joined
) => (float[1, {TOKENS}, {CHANNELS}] y) {{
  cut = Gather<axis = 1>(rows, order)
  q, k, v = Split<axis = 2, num_outputs = 3>(cut)
  q4 = Reshape(q, heads)
  k4 = Reshape(k, heads)
  v4 = Reshape(v, heads)
  qt = Transpose<perm = [0, 2, 1, 3]>(q4)
  kt = Transpose<perm = [0, 2, 3, 1]>(k4)
  vt = Transpose<perm = [0, 2, 1, 3]>(v4)
  qs = Mul(qt, scale)
  scores = MatMul(qs, kt)
  biased = Add(scores, bias)
  SUMS
  weights = Softmax<axis = -1>(summed)
  found = MatMul(weights, vt)
  turned = Transpose<perm = [0, 2, 1, 3]>(found)
  whole = Reshape(turned, joined)
  y = Gather<axis = 1>(whole, back)
}}"""
SHIFTED = """mask = Gather<axis = 0>(masks, which)
  both = Min(mask, dropped)
  summed = Add(biased, both)"""
PLAIN = "summed = Add(biased, bias)"
DROPPED = "summed = Add(biased, dropped)"


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    """A cache of two windows' scores."""
    scores = HEADS * PLACES * PLACES * 4
    monkeypatch.setattr(windows, "_CHUNK", 2 * scores)
    monkeypatch.setattr(windows, "_WORTH", 2 * scores)


def feeds() -> dict[str, np.ndarray]:
    order = np.random.default_rng(1).permutation(TOKENS)
    return {
        "rows": data(1, TOKENS, 3 * CHANNELS),
        "order": order,
        "back": np.argsort(order),
        "which": np.array([0, 1, 0, 0, 1, 1]),
        "dropped": np.where(data(WINDOWS, 1, 1, PLACES, seed=3) > 0.5, -50, 0).astype(np.float32),
    }


def model_of(sums: str) -> tuple[ir.Model, dict[str, np.ndarray]]:
    constants = {
        "bias": data(HEADS, PLACES, PLACES, seed=2),
        "masks": np.where(data(2, 1, PLACES, PLACES, seed=4) > 0.5, -50, 0).astype(np.float32),
        "scale": np.float32(DEPTH**-0.5),
        "heads": np.array([WINDOWS, PLACES, HEADS, DEPTH]),
        "joined": np.array([1, TOKENS, CHANNELS]),
    }
    model = graph(SWIN.replace("SUMS", sums), **constants)
    read = {value.name for value in model.graph.inputs}
    given = {name: array for name, array in feeds().items() if name in read}
    return model, given


def body_of(model: ir.Model) -> ir.Graph:
    return node_of(model, "Scan").attributes["body"].as_graph()


@pytest.mark.parametrize("sums", [SHIFTED, DROPPED, PLAIN])
def test_windows_are_looped_over(sums):
    model, given = model_of(sums)
    (wanted,) = run(model, **given).values()
    LoopWindows()(model)
    assert not {"Softmax", "MatMul", "Split"} & set(ops(model))
    body = body_of(model)
    assert [list(value.shape) for value in body.outputs] == [[2, PLACES, HEADS, DEPTH]]
    (got,) = run(model, **given).values()
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_what_windows_share_stays_outside():
    """Rows are chosen from, biases and masks read where they are; only what differs by window is cut."""
    model, _ = model_of(SHIFTED)
    LoopWindows()(model)
    scan = node_of(model, "Scan")
    cut = {tuple(value.shape) for value in body_of(model).inputs}
    assert cut == {(2,), (2, 1, 1, PLACES), (2 * PLACES,)} and len(scan.inputs) == len(cut)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(turned, joined)", "(turned, joined)\n  z = Identity(weights)"),  # scores that somebody else reads
        ("MatMul(weights, vt)", "Add(weights, weights)"),  # no attention
    ],
)
def test_what_is_no_attention_alone_is_left(old, new):
    text = SWIN.replace("SUMS", PLAIN).replace(old, new)
    text = text.replace("y = Gather<axis = 1>(whole, back)", "y = Identity(found)") if "Add(weights" in new else text
    model = graph(text, scale=np.float32(1), heads=np.array([WINDOWS, PLACES, HEADS, DEPTH]),
                  joined=np.array([1, TOKENS, CHANNELS]))  # fmt: skip
    before = ops(model)
    LoopWindows()(model)
    assert ops(model) == before


def test_scores_that_fit_a_cache_are_left(monkeypatch):
    monkeypatch.setattr(windows, "_WORTH", WINDOWS * HEADS * PLACES * PLACES * 4)
    model, _ = model_of(PLAIN)
    before = ops(model)
    LoopWindows()(model)
    assert ops(model) == before


def test_a_value_read_window_by_window_and_as_a_whole_is_left():
    """The rows that windows choose from are the order they choose by: cutting it would change what they find."""
    model = graph(
        f"""g (float[{WINDOWS}, {HEADS}, {PLACES}, {DEPTH}] q, float[{WINDOWS}, {HEADS}, {DEPTH}, {PLACES}] k,
          int64[{WINDOWS}] which, float[{WINDOWS}, 1, 1, {PLACES}] table
        ) => (float[{WINDOWS}, {HEADS}, {PLACES}, {DEPTH}] y) {{
          scores = MatMul(q, k)
          chosen = Gather<axis = 0>(table, which)
          more = Add(scores, chosen)
          again = Add(more, table)
          weights = Softmax<axis = -1>(again)
          y = MatMul(weights, q)
        }}"""
    )
    given = {
        "q": data(WINDOWS, HEADS, PLACES, DEPTH), "k": data(WINDOWS, HEADS, DEPTH, PLACES, seed=1),
        "table": data(WINDOWS, 1, 1, PLACES, seed=2), "which": np.arange(WINDOWS)[::-1].copy(),
    }  # fmt: skip
    (wanted,) = run(model, **given).values()
    LoopWindows()(model)
    (got,) = run(model, **given).values()
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_a_bias_of_keys_becomes_a_column():
    model, given = model_of(DROPPED)
    (wanted,) = run(model, **given).values()
    assert ops(model).count("Add") == 2
    FoldKeyBiases()(model)
    sums = [node for node in model.graph if node.op_type == "Add" and static_shape(node.outputs[0])[2] == PLACES]
    assert len(sums) == 1, "the bias by position stays"
    product = next(node for node in model.graph if node.op_type == "MatMul")
    assert [static_shape(value)[-2:] for value in product.inputs] == [(PLACES, DEPTH + 1), (DEPTH + 1, PLACES)]
    (got,) = run(model, **given).values()
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    LoopWindows()(model)
    assert "MatMul" not in ops(model)
    (looped,) = run(model, **given).values()
    np.testing.assert_allclose(looped, wanted, atol=1e-6)


def test_a_mask_that_differs_by_query_is_added():
    model, _ = model_of(SHIFTED)
    before = ops(model)
    FoldKeyBiases()(model)
    assert sorted(ops(model)) == sorted(before)
