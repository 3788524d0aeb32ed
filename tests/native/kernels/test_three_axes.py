"""A direct convolution over three spatial axes: its taps and its pixels are offsets, so kernels ask for no rank."""

from __future__ import annotations

import numpy as np
import pytest
from native_harness import Callable, aligned
from plane_kernels import channel_list, machine

from dvexport.targets.tvm.kernels.conv.direct import direct_conv, spec_for
from dvexport.targets.tvm.kernels.conv.direct_data import (
    Window,
    dense_runs,
    direct_shape,
    direct_weights,
    run_list,
    scratch_floats,
    tile_runs,
)
from dvexport.targets.tvm.kernels.plane import Plane

SIZE = (4, 6, 9)


def reference(image: np.ndarray, weights: np.ndarray, window: Window, size: tuple[int, ...]) -> np.ndarray:
    """Every output in float64."""
    padded = np.pad(image.astype(np.float64), ((0, 0), *((pad, pad) for pad in window.pads)))
    made = np.zeros((len(weights), *size))
    for tap in np.ndindex(window.kernel):
        steps = zip(tap, window.strides, size, strict=True)
        seen = padded[(slice(None), *(slice(at, at + (count - 1) * step + 1, step) for at, step, count in steps))]
        made += np.tensordot(weights[(slice(None), slice(None), *tap)].astype(np.float64), seen, 1)
    return made


@pytest.mark.parametrize(("window", "grid"), [
    (Window((3, 3, 3), pads=(1, 1, 1)), None),
    (Window((3, 3, 3), pads=(1, 1, 1)), (2, 2, 3)),
    (Window((3, 1, 1), (2, 1, 1), (1, 0, 0)), None),
])  # fmt: skip
def test_direct_convolution(window, grid):
    rng, target = np.random.default_rng(3), machine(8)
    out = tuple(
        (n + 2 * p - k) // s + 1 for n, p, k, s in zip(SIZE, window.pads, window.kernel, window.strides, strict=True)
    )
    x, y = Plane(SIZE), Plane(out)
    image, weights = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, *SIZE), (3, 2, *window.kernel)))
    runs = dense_runs(x, y, window, target) if grid is None else tile_runs(x, y, window, grid, target)
    cells = np.ones(len(runs.starts) - 1, bool)
    if grid is not None:
        cells[::2] = False
    spec = spec_for(window, runs, (2, 3), target, residual=False, relu=False)
    options = spec.memory(target)
    given = {
        "X": x.pack(image), "W": direct_weights(weights), "B": np.zeros(3, np.float32), "inside": y.inside(),
        "rows": channel_list(np.ones(3, bool)), "cols": channel_list(np.ones(2, bool)),
        "runs": run_list(runs, cells, target), "scratch": np.zeros(scratch_floats(window.size, 2, 1, **options), "f4"),
        "shape": direct_shape(x, y, window, (2, 3), **options), "Y": np.full((3, y.size), 7, np.float32),
    }  # fmt: skip
    kernel = Callable(direct_conv(spec, target), target)
    views = [aligned(given[name]) for name in kernel.kernel.buffers]
    kernel(*views)
    expected = reference(image, weights, window, out)
    if grid is not None:
        of_axis = [np.arange(size) * count // size for size, count in zip(out, grid, strict=True)]
        active = cells.reshape(grid)[np.ix_(*of_axis)]
        expected = np.where(active, expected, 7)
    np.testing.assert_allclose(y.unpack(views[-1]), expected, rtol=0, atol=1e-5)
