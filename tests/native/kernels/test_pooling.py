"""Pooling kernels against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from plane_kernels import compiled, every_two, rng, run

from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.kernels.planes import pooling

WINDOWS = [
    ((112, 112), (3, 3), (2, 2), (1, 1)),
    ((56, 56), (2, 2), (2, 2), (0, 0)),
    ((13, 17), (3, 3), (2, 2), (1, 1)),
    ((14, 14), (3, 3), (1, 1), (1, 1)),
    ((9, 21), (5, 4), (3, 1), (2, 1)),
    ((7, 7), (2, 3), (1, 2), (0, 1)),
    ((3, 2), (2, 2), (1, 1), (0, 0)),
]


def positive(*shape: int) -> np.ndarray:
    return rng().random(shape).astype(np.float32)


def windows(image: np.ndarray, kernel, strides, pads) -> np.ndarray:
    """The windows `[C, oh, ow, kh, kw]` of images, zero beyond the edges."""
    padded = np.pad(image.astype(np.float64), ((0, 0), *((pad, pad) for pad in pads)))
    views = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=(1, 2))
    return views[:, :: strides[0], :: strides[1]]


@every_two({"size, kernel, strides, pads": WINDOWS, "kind": ["max", "avg"]})
def test_windows(lanes, threads, size, kernel, strides, pads, kind):
    image = positive(3, *size)
    expected = windows(image, kernel, strides, pads)
    expected = expected.max((3, 4)) if kind == "max" else expected.mean((3, 4))
    source, target = Plane(size, max(*pads, 1)), Plane(expected.shape[1:])
    count = 1 if kind == "max" else kernel[0] * kernel[1]
    shape = pooling.pool_shape(3, source, target, strides, pads, count)
    pool = compiled({"max": pooling.max_pool, "avg": pooling.avg_pool}[kind], lanes, kernel, strides[1])
    rubbish = np.full((3, target.size), np.nan, np.float32)
    y = run(pool, source.pack(image), shape, rubbish, threads=threads)[-1]
    np.testing.assert_allclose(y, target.pack(expected), rtol=1e-6, atol=0)


def test_windows_wider_than_the_padding_are_refused():
    with pytest.raises(ValueError, match="the layout has 1"):
        pooling.pool_shape(3, Plane((8, 8)), Plane((8, 8)), (1, 1), (2, 2))


@every_two({"size": [(56, 56), (13, 17), (14, 14)], "cell": [(8, 8), (4, 4), (2, 2), (1, 1), (3, 6), (5, 7), (2, 12)]})
def test_cell_mean(lanes, threads, size, cell):
    plane, image = Plane(size), positive(5, *size)
    expected = windows(image, cell, cell, (0, 0)).mean((3, 4))
    scratch = np.full(pooling.cell_mean_scratch(plane, cell, threads), np.nan, np.float32)
    shape = pooling.cell_mean_shape(5, plane, cell)
    rubbish = np.full(expected.shape, np.nan, np.float32)
    y = run(compiled(pooling.cell_mean, lanes), plane.pack(image), scratch, shape, rubbish, threads=threads)[-1]
    np.testing.assert_allclose(y, expected, rtol=2e-6)


@every_two({"size": [(56, 56), (13, 17), (7, 7), (1, 1), (4, 4)]})
def test_global_mean(lanes, threads, size):
    plane, image = Plane(size), positive(7, *size)
    shape = pooling.global_mean_shape(7, plane)
    y = run(compiled(pooling.global_mean, lanes), plane.pack(image), shape, np.zeros(7, np.float32), threads=threads)[
        -1
    ]
    np.testing.assert_allclose(y, image.astype(np.float64).mean((1, 2)), rtol=1e-6)
