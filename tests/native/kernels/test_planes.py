"""Plane kernels against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from native_harness import aligned
from plane_kernels import channel_list, compiled, every_machine, every_two, pixel_mask, rng, run

from dvexport.targets.tvm.kernels import lists
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.kernels.planes import elementwise, planes

SIZES = [(56, 56, 1), (13, 17, 1), (7, 7, 1), (14, 14, 2), (3, 3, 1), (1, 1, 1), (9, 35, 3), (6, 16, 0)]


def normal(*shape: int) -> np.ndarray:
    return rng().standard_normal(shape).astype(np.float32)


@every_two({"size": SIZES})
def test_frame_becomes_planes_and_back(lanes, threads, size):
    plane = Plane(size[:2], size[2])
    frame, rubbish = normal(5, *size[:2]), np.full((5, plane.size), np.nan, np.float32)
    shape = planes.frame_shape(5, plane)
    loaded = run(compiled(planes.load_frame, lanes), frame, shape, rubbish, threads=threads)[-1]
    np.testing.assert_array_equal(loaded, plane.pack(frame))
    back = run(compiled(planes.store_planes, lanes), loaded, shape, np.zeros_like(frame), threads=threads)[-1]
    np.testing.assert_array_equal(back, frame)


@every_two({"size": SIZES})
def test_zero_pads_leaves_the_image(lanes, threads, size):
    plane, image = Plane(size[:2], size[2]), normal(4, *size[:2])
    dirty = np.where(plane.inside() == 1, plane.pack(image), np.nan)
    (_, clean) = run(compiled(planes.zero_pads, lanes), planes.frame_shape(4, plane), dirty, threads=threads)
    np.testing.assert_array_equal(clean, plane.pack(image))


@every_two({"size": SIZES})
def test_zero_ends_leaves_what_is_between_the_first_and_the_last_pixel(lanes, threads, size):
    plane = Plane(size[:2], size[2])
    dirty = normal(4, plane.size)
    (_, clean) = run(compiled(planes.zero_ends, lanes), planes.ends_shape(4, plane), dirty, threads=threads)
    first, last = plane.offset(0, 0), plane.offset(plane.height - 1, plane.width)
    np.testing.assert_array_equal(clean[:, first:last], dirty[:, first:last])
    assert not clean[:, :first].any()
    assert not clean[:, last:].any()


@every_two({"count": [1, 3, 4, 15, 64, 1000]})
def test_clear(lanes, threads, count):
    shape = elementwise.elementwise_shape(count)
    y = run(compiled(elementwise.clear, lanes), shape, normal(count), threads=threads)[-1]
    assert (y == 0).all()


@every_two({"count": [1, 3, 4, 15, 63, 64, 400, 1023]})
def test_add(lanes, threads, count):
    x, z = normal(2, count)
    shape = elementwise.elementwise_shape(count)
    y = run(compiled(elementwise.add, lanes), x, z, shape, np.zeros_like(x), threads=threads)[-1]
    np.testing.assert_array_equal(y, x + z)


@every_two({})
def test_add_in_place(lanes, threads):
    x, z = normal(2, 1000)
    for place in (0, 1):
        views = [aligned(x), aligned(z)]
        kernel = compiled(elementwise.add, lanes)
        kernel(*views, aligned(elementwise.elementwise_shape(1000)), views[place], threads=threads)
        np.testing.assert_array_equal(views[place], x + z)
        np.testing.assert_array_equal(views[1 - place], (z, x)[place])


@every_machine
@pytest.mark.parametrize("count", [5, 64, 999])
def test_relu(lanes, count):
    x = normal(count) * 8
    shape = elementwise.elementwise_shape(count)
    y = run(compiled(elementwise.relu, lanes), x, shape, np.zeros_like(x), threads=2)[-1]
    np.testing.assert_array_equal(y, np.maximum(x, 0))


@every_two({"rows, count": [(1, 1), (1, 3), (1, 5000), (3, 7), (5, 33), (4, 0)]})
def test_copy_of_rows(lanes, threads, rows, count):
    x, y = normal(rows, count + 9), normal(rows, count + 4)
    shape = elementwise.copy_shape(count, rows, count + 9, count + 4)
    copied = run(compiled(elementwise.copy, lanes), x, shape, y, threads=threads)[-1]
    np.testing.assert_array_equal(copied[:, :count], x[:, :count])
    np.testing.assert_array_equal(copied[:, count:], y[:, count:])


class Case:
    """Planes, a tile mask and channels of one merge; what nobody computed is NaN."""

    def __init__(self, size: tuple[int, int, int], grid: tuple[int, int], rate: float) -> None:
        random = rng()
        self.plane = Plane(size[:2], size[2])
        self.tiles = random.random(grid) < rate
        self.chosen = random.random(6) < rate
        self.pixels = pixel_mask(self.tiles, *size[:2])
        self.image = np.where(self.pixels, normal(6, *size[:2]), np.float32(np.nan))
        self.mask = self.plane.pack(self.pixels.astype(np.float32))
        self.v = self.plane.pack(self.image)
        self.u = np.full_like(self.v, 3)
        self.shape = planes.merge_shape(self.plane)
        self.merged = self.plane.pack(np.where(self.pixels, self.image, 0))

    def ring(self, halo: int) -> np.ndarray:
        """Pixels, pads included, within `halo` of an active one."""
        flags, ring = self.mask.astype(bool), np.zeros(self.plane.size, bool)
        for dy in range(-halo, halo + 1):
            for dx in range(-halo, halo + 1):
                ring |= np.roll(flags, dy * self.plane.pitch + dx)
        return ring


CASES = [((56, 56, 1), (7, 7)), ((13, 17, 1), (3, 4)), ((7, 7, 1), (7, 7)), ((14, 14, 2), (7, 7))]


@every_two({"size, grid": CASES, "rate": [0, 0.1, 0.5, 1]})
def test_merge(lanes, threads, size, grid, rate):
    case = Case(size, grid, rate)
    rows = channel_list(case.chosen)
    u = run(compiled(planes.merge, lanes), case.v, case.mask, rows, case.shape, case.u, threads=threads)[-1]
    np.testing.assert_array_equal(u, np.where(case.chosen[:, None], case.merged, case.u))


@every_two({"size, grid": CASES, "rate": [0, 0.1, 0.5, 1]})
def test_merge_lines_writes_what_a_window_reads(lanes, threads, size, grid, rate):
    case = Case(size, grid, rate)
    rows, halo = channel_list(case.chosen), size[2]
    lines = touched(case, grid, halo)
    arguments = (case.v, case.mask, rows, lines, case.shape, case.u)
    u = run(compiled(planes.merge_lines, lanes), *arguments, threads=threads)[-1]
    read, chosen = case.ring(halo), case.chosen
    np.testing.assert_array_equal(u[chosen][:, read], case.merged[chosen][:, read])
    beyond = u[chosen][:, ~read]
    assert ((beyond == 3) | (beyond == 0)).all(), "only lines of the ring may be written, and only by zeros"
    np.testing.assert_array_equal(u[~chosen], case.u[~chosen])


def touched(case: Case, grid: tuple[int, int], halo: int) -> np.ndarray:
    table, shape = lists.line_table(case.plane, grid, halo), lists.lines_shape(case.plane, grid)
    empty = np.zeros(lists.line_list_size(case.plane), np.int32)
    kernel = compiled(lists.touched_lines, 16, lists.table_words(grid))
    return run(kernel, case.tiles.astype(np.uint8), table, shape, empty)[-1]


@every_two({"size, grid": CASES})
def test_merge_history_takes_reused_channels_from_the_history(lanes, threads, size, grid):
    case = Case(size, grid, 0.6)
    action = np.array([2, 1, 0, 2, 1, 1], np.int64)
    history = case.plane.pack(normal(6, *size[:2]) + 5)
    arguments = (case.v, history, case.mask, action, channel_list(action != 0), case.shape, case.u)
    u = run(compiled(planes.merge_history, lanes), *arguments, threads=threads)[-1]
    reused = np.where(case.mask != 0, history, 0)
    expected = np.select([action[:, None] == 2, action[:, None] == 1], [case.merged, reused], case.u)
    np.testing.assert_array_equal(u, expected)
