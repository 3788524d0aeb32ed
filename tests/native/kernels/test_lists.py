"""List kernels against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from covering import every_pair
from plane_kernels import LANES, compiled, machine, pixel_mask, rng, run

from dvexport.targets.tvm.kernels import lists
from dvexport.targets.tvm.kernels.bounds import LIST_HEAD
from dvexport.targets.tvm.kernels.plane import Plane

RATES = [0, 0.02, 0.5, 1]


def flags(rate: float, *shape: int) -> np.ndarray:
    return (rng().random(shape) < rate).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 64, 513])
@pytest.mark.parametrize("rate", RATES)
def test_channels_from_mask(channels, rate):
    mask = flags(rate, channels)
    found = run(compiled(lists.channels_from_mask, 16), mask, lists.channels_shape(channels), new_list(channels))[-1]
    assert_channels(found, mask != 0)


@pytest.mark.parametrize("channels", [1, 3, 64, 513])
@pytest.mark.parametrize("constant", [0, 1, 2])
def test_channels_from_action(channels, constant):
    action = rng().integers(0, 3, channels)
    shape = lists.channels_shape(channels, constant)
    found = run(compiled(lists.channels_other_than, 16), action, shape, new_list(channels))[-1]
    assert_channels(found, action != constant)


def new_list(channels: int) -> np.ndarray:
    return np.full(lists.channel_list_size(channels), -1, np.int32)


def assert_channels(found: np.ndarray, expected: np.ndarray) -> None:
    assert found[0] == expected.sum()
    np.testing.assert_array_equal(found[1 : 1 + found[0]], np.flatnonzero(expected))


@every_pair(
    {"lanes": LANES, "per_cell": [[4], [8], [1], [16], [3, 5, 4], [2, 0, 19]], "cells": [49, 1, 6], "rate": RATES}
)
def test_cells_to_runs(lanes, per_cell, cells, rate):
    random, active = rng(), flags(rate, cells)
    counts = [per_cell[cell % len(per_cell)] for cell in range(cells)]
    starts = np.cumsum([0, *counts])
    outputs, inputs = ([random.integers(0, 9999, count).tolist() for count in counts] for _ in range(2))
    for run_length in (size for size in (1, 2, 4, 8, 16) if size <= lanes):
        kernel = compiled(lists.cells_to_runs, lanes)
        shape = lists.runs_shape(cells, sum(counts), run_length, machine(lanes))
        capacity = int(shape[3])
        empty = np.full(lists.run_list_size(capacity), -1, np.int32)
        found = run(kernel, active, np.concatenate([starts, *outputs, *inputs]).astype(np.int32), shape, empty)[-1]
        assert_runs(found, (capacity, lanes // run_length), pick(outputs, active), pick(inputs, active))


def pick(offsets: list[list[int]], active: np.ndarray) -> list[int]:
    return [offset for cell, chosen in zip(offsets, active, strict=True) if chosen for offset in cell]


def assert_runs(found, sizes, outputs, inputs) -> None:
    capacity, vector = sizes
    count = -(-len(outputs) // vector) * vector
    assert found[0] * vector == count and found[1] == capacity
    for start, offsets in ((LIST_HEAD, outputs), (LIST_HEAD + capacity, inputs)):
        padded = offsets + offsets[-1:] * (count - len(offsets))
        np.testing.assert_array_equal(found[start : start + count], padded)


PLANES = [((56, 56, 1), (7, 7)), ((13, 17, 1), (3, 4)), ((7, 7, 1), (7, 7)), ((14, 14, 2), (7, 7)), ((5, 3, 1), (7, 4)),
          ((40, 40, 1), (10, 10)), ((24, 33, 3), (2, 1)), ((8, 8, 0), (2, 2)), ((12, 12, 5), (3, 3))]  # fmt: skip


@every_pair({"lanes": LANES, "size, grid": PLANES, "rate": RATES})
def test_mask_from_tiles(lanes, size, grid, rate):
    plane, tiles = Plane(size[:2], size[2]), flags(rate, *grid)
    rubbish = np.full(plane.size, np.nan, np.float32)
    mask = run(compiled(lists.mask_from_tiles, lanes), tiles, lists.mask_shape(plane, grid), rubbish)[-1]
    np.testing.assert_array_equal(mask, plane.pack(pixel_mask(tiles, *size[:2]).astype(np.float32)))


@pytest.mark.parametrize(("size", "grid"), PLANES)
@pytest.mark.parametrize("rate", RATES)
def test_touched_lines(size, grid, rate):
    plane, tiles, halo = Plane(size[:2], size[2]), flags(rate, *grid), size[2]
    table, shape = lists.line_table(plane, grid, halo), lists.lines_shape(plane, grid)
    empty = np.full(lists.line_list_size(plane), -1, np.int32)
    found = run(compiled(lists.touched_lines, 16, lists.table_words(grid)), tiles, table, shape, empty)[-1]
    active = np.argwhere(pixel_mask(tiles, *size[:2]))
    near = range(-halo, halo + 1)
    touched = {plane.offset(y + dy, x + dx) // plane.dtype.line for y, x in active for dy in near for dx in near}
    assert found[0] == len(touched) and found[1] == plane.size // plane.dtype.line
    np.testing.assert_array_equal(
        found[LIST_HEAD : LIST_HEAD + found[0]], [plane.dtype.line * line for line in sorted(touched)]
    )


def test_a_halo_wider_than_the_padding_is_refused():
    with pytest.raises(ValueError, match="padding of 1"):
        lists.line_table(Plane((8, 8)), (2, 2), 2)
