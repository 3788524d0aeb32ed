"""What the tests of plane, list and dense kernels share: machines, compiled kernels, guarded memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable as Function
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from covering import every_pair
from native_harness import Callable, aligned, host_machine

from dvexport.targets.tvm.kernels.abi import Kernel
from dvexport.targets.tvm.machine.machine import Machine

GUARD = 64
"""Elements before and after a buffer that no kernel may write."""

LANES, THREADS = (4, 8, 16), (1, 2, 3)

every_machine = pytest.mark.parametrize("lanes", LANES)
every_split = pytest.mark.parametrize("threads", THREADS)


def every_two(columns: Mapping[str, Iterable[Any]]) -> pytest.MarkDecorator:
    """Parametrize by machines, splits and `columns`, so that every two values of different columns meet."""
    return every_pair({"lanes": LANES, "threads": THREADS, **columns})


def machine(lanes: int) -> Machine:
    """This host with vectors of `lanes` floats."""
    return dataclasses.replace(host_machine(), lanes=lanes)


@functools.cache
def compiled(generator: Function[..., Kernel], lanes: int, *spec: object) -> Callable:
    """The kernel that `generator(*spec, machine)` makes, loaded."""
    return Callable(generator(*spec, machine(lanes)), machine(lanes))


def run(kernel: Callable, *arrays: np.ndarray, threads: int = 1) -> list[np.ndarray]:
    """Call a kernel on guarded copies and return those; fails if it wrote outside of them or into all but the last."""
    views = [aligned(array, GUARD) for array in arrays]
    kernel(*views, threads=threads)
    for name, view, array in zip(kernel.kernel.buffers, views, arrays, strict=True):
        memory = view.base
        start = view.ctypes.data - memory.ctypes.data
        assert (memory[:start] == 0xAA).all() and (memory[start + view.nbytes :] == 0xAA).all(), name
        if name not in (kernel.kernel.buffers[-1], "scratch"):
            np.testing.assert_array_equal(view, array, err_msg=name)
    return views


def rng() -> np.random.Generator:
    """Random numbers, the same in every run."""
    return np.random.default_rng(7)


def channel_list(mask: np.ndarray) -> np.ndarray:
    """The channel list of a mask, with rubbish behind it."""
    chosen = np.flatnonzero(mask)
    return np.concatenate([[len(chosen)], chosen, np.full(len(mask) - len(chosen), -1)]).astype(np.int32)


def pixel_mask(tiles: np.ndarray, height: int, width: int) -> np.ndarray:
    """Upsample tiles `[gh, gw]` to pixels by docs/dialect.md."""
    ys, xs = np.arange(height) * tiles.shape[0] // height, np.arange(width) * tiles.shape[1] // width
    return tiles[np.ix_(ys, xs)]
