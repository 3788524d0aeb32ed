"""F(2,3) and F(4,3) against the direct convolution."""

from __future__ import annotations

import numpy as np
import pytest

from dvexport.passes.tiles.winograd import WINOGRAD_STEPS, transforms, winograd_applies, winograd_weight


@pytest.mark.parametrize("m", sorted(WINOGRAD_STEPS.values()))
def test_transforms_are_exact(m):
    rng = np.random.default_rng(m)
    to_points, weight, from_points = transforms(m)
    patch, kernel = rng.standard_normal((m + 2, m + 2)), rng.standard_normal((3, 3))
    direct = [[(patch[y : y + 3, x : x + 3] * kernel).sum() for x in range(m)] for y in range(m)]
    found = from_points @ ((to_points @ patch.ravel()) * (weight @ kernel.ravel()))
    np.testing.assert_allclose(found.reshape(m, m), direct, rtol=0, atol=1e-13)


@pytest.mark.parametrize("m", sorted(WINOGRAD_STEPS.values()))
@pytest.mark.parametrize("channels", [3, 64, 512])
def test_float32_error(m, channels):
    rng = np.random.default_rng(channels)
    patch = np.maximum(rng.standard_normal((channels, m + 2, m + 2)), 0).astype(np.float32)
    kernel = (rng.standard_normal((4, channels, 3, 3)) / np.sqrt(9 * channels)).astype(np.float32)
    exact = np.zeros((4, m, m))
    for y, x in np.ndindex(m, m):
        exact[:, y, x] = np.einsum("chw,ochw->o", patch[:, y : y + 3, x : x + 3].astype(np.float64), kernel)
    to_points, _, from_points = (matrix.astype(np.float32) for matrix in transforms(m))
    points = to_points @ patch.reshape(channels, -1).T
    products = np.einsum("pc,pco->po", points, winograd_weight(kernel, m))
    found = (from_points @ products).T.reshape(4, m, m)
    assert np.abs(found - exact).max() < 1e-5 * np.abs(exact).max()


CONV = {"strides": (1, 1), "dilations": (1, 1), "pads": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("kernel", "changes", "size", "grid", "m", "applies"),
    [
        ((3, 3), {}, (16, 16), (4, 4), 4, True),
        ((3, 3), {}, (16, 16), (4, 4), 2, True),
        ((3, 3), {}, (8, 8), (4, 4), 4, False),
        ((3, 3), {}, (12, 12), (2, 2), 4, False),
        ((3, 3), {}, (13, 12), (3, 3), 2, False),
        ((1, 1), {"pads": (0, 0, 0, 0)}, (16, 16), (4, 4), 2, False),
        ((3, 3), {"strides": (2, 2)}, (16, 16), (4, 4), 2, False),
        ((3, 3), {"dilations": (2, 2)}, (16, 16), (4, 4), 2, False),
        ((3, 3), {"pads": (0, 0, 0, 0)}, (16, 16), (4, 4), 2, False),
    ],
)
def test_applies(kernel, changes, size, grid, m, applies):
    assert winograd_applies(kernel, CONV | changes, size, grid, m) is applies
