"""Layer normalisation and the choice of tokens against numpy."""

from __future__ import annotations

import numpy as np
from covering import every_pair
from native_harness import Callable
from plane_kernels import THREADS, compiled, every_machine, every_two, machine, rng, run

from dvexport.targets.tvm.kernels.tokens import tokens
from dvexport.targets.tvm.kernels.tokens.tokens import scatter, scatter_shape


@every_two({"rows, columns": [(1, 1), (3, 7), (5, 64), (9, 100), (17, 384)]})
def test_layer_norm(lanes, threads, rows, columns):
    random = rng()
    x = (random.standard_normal((rows, columns)) * 3 + 100).astype(np.float32)
    weight, bias = random.standard_normal((2, columns)).astype(np.float32)
    wide, eps = x.astype(np.float64), 1e-3
    expected = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + eps) * weight + bias
    constants = [weight, bias, np.array([eps], np.float32), tokens.layer_norm_shape(rows, columns)]
    y = run(compiled(tokens.layer_norm, lanes), x, *constants, np.full_like(x, np.nan), threads=threads)[-1]
    np.testing.assert_allclose(y, expected, rtol=0, atol=3e-5 * max(1, np.abs(expected).max()))


def select(lanes: int, threads: int, x: np.ndarray, score: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and tokens that the kernel keeps."""
    batches, count, channels = x.shape
    index, kept = np.full((batches, keep), -1, np.int64), np.full((batches, keep, channels), np.nan, np.float32)
    kernel = compiled(tokens.select_tokens, lanes)
    from native_harness import aligned

    views = [aligned(a, 64) for a in (x, score, tokens.select_shape(batches, count, channels, keep), index, kept)]
    kernel(*views, threads=threads)
    for view in views:
        start = view.ctypes.data - view.base.ctypes.data
        assert (view.base[:start] == 0xAA).all() and (view.base[start + view.nbytes :] == 0xAA).all()
    return views[3], views[4]


@every_two({"batches, count, channels, keep": [(1, 1, 1, 1), (2, 19, 5, 7), (1, 196, 96, 148)], "levels": [1, 3, 1000]})
def test_select_tokens(lanes, threads, batches, count, channels, keep, levels):
    """Few levels of score: ties, which go to the lower index; all equal: the first ones."""
    random = rng()
    x = random.standard_normal((batches, count, channels)).astype(np.float32)
    score = (random.integers(0, levels, (batches, count)) / levels - 0.5).astype(np.float32)
    score[0, 0] = -0.0 if levels == 1000 else score[0, 0]
    index, kept = select(lanes, threads, x, score, keep)
    expected = np.argsort(score, axis=1, kind="stable")[:, :keep]
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_array_equal(kept, np.take_along_axis(x, expected[:, :, None], 1))


@every_machine
def test_nan_counts_as_infinite(lanes):
    """A damaged score never writes out of bounds or leaves a place empty."""
    score = np.array([[np.nan, 2, -np.inf, np.nan, np.inf, 0, 1, -1, -2]], np.float32)
    x = np.arange(9, dtype=np.float32).reshape(1, 9, 1)
    index, _ = select(lanes, 2, x, score, 9)
    np.testing.assert_array_equal(index, [[2, 8, 7, 5, 6, 1, 0, 3, 4]])


@every_pair(
    {"threads": THREADS, "dtype": ["float32", "int64"], "rows, count, updates": [(1, 1, 1), (3, 19, 7), (1, 196, 148)]}
)
def test_scatter(threads, dtype, rows, count, updates):
    """Places of all orders, from the end too, and one that is not there."""
    random = rng()
    x, update = (random.integers(-9, 9, (rows, size)).astype(dtype) for size in (count, updates))
    index = np.stack([random.permutation(count)[:updates] for _ in range(rows)])
    expected = x.copy()
    np.put_along_axis(expected, index, update, 1)
    index[0, 0] -= count
    outside = np.full((rows, 1), count)
    given = np.concatenate([index, outside], 1)
    more = np.concatenate([update, np.full((rows, 1), 99)], 1).astype(dtype)
    kernel = Callable(scatter(dtype), machine(8))
    shape = scatter_shape(rows, count, updates + 1)
    found = run(kernel, x, given, more, shape, np.full_like(x, -1), threads=threads)[-1]
    np.testing.assert_array_equal(found, expected)
