"""Attention and products of activations against numpy in float64."""

from __future__ import annotations

import numpy as np
from attention_arrays import heads_of, interleaved, softmax
from plane_kernels import compiled, every_machine, every_two, machine, rng, run

from dvexport.targets.tvm.kernels.tokens.attention import (
    Attention,
    Bias,
    Sizes,
    Strides,
    attention,
    attention_scratch,
    attention_shape,
    attention_spec,
)

SIZES = [
    Sizes(1, 1, 1, 1, 1, 1),
    Sizes(1, 3, 70, 70, 64, 64),
    Sizes(2, 2, 49, 49, 32, 32),
    Sizes(1, 2, 33, 101, 20, 12),
    Sizes(1, 1, 8, 512, 16, 37),
]


@every_two({"sizes": SIZES, "biases": [0, 1, 2]})
def test_attention(lanes, threads, sizes, biases):
    random, on = rng(), machine(lanes)
    widths = {"q": (sizes.queries, sizes.depth), "k": (sizes.keys, sizes.depth), "v": (sizes.keys, sizes.width)}
    q, k, v = (
        random.standard_normal((sizes.batches, rows, sizes.heads * width)).astype(np.float32)
        for rows, width in widths.values()
    )
    square = sizes.queries * sizes.keys
    table = random.standard_normal((sizes.heads, sizes.queries, sizes.keys)).astype(np.float32)
    mask = np.where(random.random((sizes.batches, 1, sizes.queries, sizes.keys)) < 0.3, -100, 0).astype(np.float32)
    given = [(table, Bias(1, 0, square)), (mask, Bias(sizes.batches, square, 0))][:biases]
    scale = np.array([0.37], np.float32)
    scores = heads_of(q, sizes.heads) @ heads_of(k, sizes.heads).swapaxes(2, 3) * float(scale[0])
    scores = sum((bias for bias, _ in given), scores)
    mixed = softmax(scores) @ heads_of(v, sizes.heads)
    expected = mixed.transpose(0, 2, 1, 3).reshape(sizes.batches, sizes.queries, -1)
    spec = attention_spec(sizes.width, biases, on)
    strides = tuple(interleaved(rows, sizes, width) for rows, width in (*widths.values(), (sizes.queries, sizes.width)))
    shape = attention_shape(sizes, strides, tuple(bias for _, bias in given), spec, on)
    scratch = np.full(attention_scratch(threads, sizes, spec, on), np.nan, np.float32)
    rubbish = np.full(expected.shape, np.nan, np.float32)
    arrays = [q, k, v, *(bias for bias, _ in given), scale, scratch, shape, rubbish]
    y = run(compiled(attention, lanes, spec), *arrays, threads=threads)[-1]
    np.testing.assert_allclose(y, expected, rtol=0, atol=3e-6 * max(1, np.abs(expected).max()))


@every_two({"sizes": SIZES, "transposed": [False, True]})
def test_product_of_activations(lanes, threads, sizes, transposed):
    """B as rows, and as columns."""
    random, on = rng(), machine(lanes)
    many = sizes.batches * sizes.heads
    a = random.standard_normal((many, sizes.queries, sizes.depth)).astype(np.float32)
    b = random.standard_normal((many, sizes.keys, sizes.depth)).astype(np.float32)
    expected = a.astype(np.float64) @ b.astype(np.float64).swapaxes(1, 2) * 2
    spec, one = Attention(1, softmax=False), Sizes(many, 1, sizes.queries, sizes.keys, sizes.depth, sizes.width)
    size = sizes.keys * sizes.depth
    strides = (
        Strides(0, sizes.queries * sizes.depth, 0, sizes.depth),
        Strides(0, size, 0, 1, sizes.keys) if transposed else Strides(0, size, 0, sizes.depth),
        Strides(0, sizes.queries * sizes.keys, 0, sizes.keys),
    )
    shape = attention_shape(one, strides, (), spec, on)
    scratch = np.full(attention_scratch(threads, one, spec, on), np.nan, np.float32)
    given = np.ascontiguousarray(b.swapaxes(1, 2)) if transposed else b
    arrays = [a, given, np.array([2], np.float32), scratch, shape, np.full(expected.shape, np.nan, np.float32)]
    y = run(compiled(attention, lanes, spec), *arrays, threads=threads)[-1]
    np.testing.assert_allclose(y, expected, rtol=0, atol=3e-6 * max(1, np.abs(expected).max()))


@every_machine
def test_large_scores_do_not_overflow(lanes):
    """Scores of a thousand: the largest is subtracted before the exponential."""
    on, sizes = machine(lanes), Sizes(1, 1, 3, 19, 8, 8)
    q, k, v = (rng().standard_normal((rows, 8)).astype(np.float32) * 30 for rows in (3, 19, 19))
    expected = softmax(q.astype(np.float64) @ k.T.astype(np.float64)) @ v
    spec = attention_spec(8, 0, on)
    shape = attention_shape(sizes, tuple(Strides(0, 0, 0, 8) for _ in range(4)), (), spec, on)
    scratch = np.full(attention_scratch(1, sizes, spec, on), np.nan, np.float32)
    arrays = [q, k, v, np.ones(1, np.float32), scratch, shape, np.full((3, 8), np.nan, np.float32)]
    y = run(compiled(attention, lanes, spec), *arrays)[-1]
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
