"""Attention in windows against numpy in float64: biases that are shared, chosen and repeated."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from attention_arrays import heads_of, interleaved, softmax
from plane_kernels import compiled, every_two, machine, rng, run

from dvexport.targets.tvm.kernels.tokens.attention import Sizes, Strides, attention_scratch, attention_spec
from dvexport.targets.tvm.kernels.tokens.window_attention import WindowBias, window_attention, window_shape
from dvexport.targets.tvm.units.attention import AttentionUnit
from dvexport.targets.tvm.units.cut import find_units


@every_two({"sizes": [Sizes(5, 2, 49, 49, 32, 32), Sizes(3, 3, 33, 20, 12, 7)], "which": ["m", "rmk"]})
def test_biases(lanes, threads, sizes, which):
    """By relative position, the same in all windows; masks, of which two serve all; one number for each key."""
    random, on = rng(), machine(lanes)
    square, batches = sizes.queries * sizes.keys, range(sizes.batches)
    relative = random.standard_normal((1, sizes.heads, sizes.queries, sizes.keys))
    masks = np.where(random.random((2, 1, sizes.queries, sizes.keys)) < 0.3, -100.0, 0)
    keys = np.where(random.random((sizes.batches, 1, 1, sizes.keys)) < 0.3, -100.0, 0)
    parts = tuple(int(n) for n in random.integers(0, 2, sizes.batches))
    known = {
        "r": (relative, relative, WindowBias((0,) * sizes.batches, 0, square, sizes.keys)),
        "m": (masks, masks[list(parts)], WindowBias(parts, square, 0, sizes.keys)),
        "k": (keys, keys, WindowBias(tuple(batches), sizes.keys, 0, 0)),
    }
    given = [known[letter] for letter in which]
    widths = [(sizes.queries, sizes.depth), (sizes.keys, sizes.depth), (sizes.keys, sizes.width)]
    q, k, v = (
        random.standard_normal((sizes.batches, rows, sizes.heads * width)).astype(np.float32) for rows, width in widths
    )
    scores = heads_of(q, sizes.heads) @ heads_of(k, sizes.heads).swapaxes(2, 3) * 0.5
    scores = sum((laid_out.astype(np.float32) for _, laid_out, _ in given), scores)
    mixed = softmax(scores) @ heads_of(v, sizes.heads)
    expected = mixed.transpose(0, 2, 1, 3).reshape(sizes.batches, sizes.queries, -1)
    spec = attention_spec(sizes.width, len(given), on)
    strides = tuple(interleaved(rows, sizes, width) for rows, width in (*widths, (sizes.queries, sizes.width)))
    shape = window_shape(sizes, strides, tuple(bias for _, _, bias in given), spec, on)
    scratch = np.full(attention_scratch(threads, sizes, spec, on), np.nan, np.float32)
    tables = [table.astype(np.float32) for table, _, _ in given]
    arrays = [
        q,
        k,
        v,
        *tables,
        np.array([0.5], np.float32),
        scratch,
        shape,
        np.full(expected.shape, np.nan, np.float32),
    ]
    y = run(compiled(window_attention, lanes, spec), *arrays, threads=threads)[-1]
    np.testing.assert_allclose(y, expected, rtol=0, atol=3e-6 * max(1, np.abs(expected).max()))


HEAD = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[6, 2, 9, 4] q, float[6, 2, 4, 9] k, float[6, 2, 9, 4] v, float[6, 1, 1, 9] dropped)
    => (float[6, 2, 9, 4] y)
    <float[2, 9, 9] relative, float[3, 1, 9, 9] masks, int64[6] which, float[6, 1, 9, 9] mask>
"""


def attention(*lines):
    """The unit of a graph whose scores get these biases."""
    body = "\n".join(f"s{i + 1} = Add (s{i}, {line})" for i, line in enumerate(lines))
    text = f"""{HEAD} {{
        chosen = Gather (masks, which)
        s0 = MatMul (q, k)
        {body}
        w = Softmax (s{len(lines)})
        y = MatMul (w, v)
    }}"""
    model = ir.from_onnx_text(text)
    values = {v.name: v for node in model.graph for v in (*node.inputs, *node.outputs) if v is not None}
    constants = {
        "relative": np.zeros((2, 9, 9), np.float32), "masks": np.zeros((3, 1, 9, 9), np.float32),
        "which": np.array([0, 2, -1, 1, 1, 0]), "mask": np.zeros((6, 1, 9, 9), np.float32),
    }  # fmt: skip
    for name, array in constants.items():
        if name in values:
            values[name].const_value = ir.tensor(array)
            values[name].shape, values[name].dtype = ir.Shape(array.shape), ir.tensor(array).dtype
    for name, value in values.items():
        if value.shape is None:
            value.shape = ir.Shape((6, 1, 9, 9) if name == "chosen" else (6, 2, 9, 9))
        if value.dtype is None:
            value.dtype = ir.DataType.FLOAT
    return next((u for u in find_units(model) if isinstance(u, AttentionUnit) and u.v is not None), None)


def test_how_biases_are_read():
    """Strides and parts, found from shapes; rows that a Gather chooses are read from their table."""
    unit = attention("relative", "chosen", "dropped")
    assert unit is not None and [each.value.name for each in unit.biases] == ["dropped", "masks", "relative"]
    found = {each.value.name: (each.parts, each.part, each.head, each.row) for each in unit.biases}
    assert found == {
        "relative": ((0,) * 6, 0, 81, 9),
        "masks": ((0, 2, 2, 1, 1, 0), 81, 0, 9),
        "dropped": (tuple(range(6)), 9, 0, 0),
    }
    (mask,) = attention("mask").biases
    assert (mask.parts, mask.part, mask.head, mask.row) == (tuple(range(6)), 81, 0, 9)
    assert attention("relative", "chosen", "dropped", "mask") is None


def test_weights_of_masked_keys_sum_to_normal_numbers():
    """Sums over keys that are all masked out so far must not be subnormal, which is many times slower."""
    sizes, on = Sizes(1, 1, 1, 24, 8, 8), machine(8)
    q, k = np.zeros((1, 8), np.float32), np.zeros((24, 8), np.float32)
    v = np.full((24, 8), 1e-6, np.float32)
    mask = np.full((1, 24), -100, np.float32)
    mask[0, -1] = 0
    spec = attention_spec(8, 1, on)
    shape = window_shape(sizes, (Strides(0, 0, 0, 8),) * 4, (WindowBias((0,), 24, 0, 24),), spec, on)
    scratch = np.zeros(attention_scratch(1, sizes, spec, on), np.float32)
    arrays = [q, k, v, mask, np.ones(1, np.float32), scratch, shape, np.full((1, 8), np.nan, np.float32)]
    views = run(compiled(window_attention, 8, spec), *arrays)
    np.testing.assert_allclose(views[-1], v[:1], rtol=1e-6)
    held = np.abs(views[-3])
    assert not ((held > 0) & (held < np.finfo(np.float32).tiny * 1e6)).any()
