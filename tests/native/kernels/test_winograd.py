"""Winograd kernels against convolution in float64, over subsets of channels and tiles."""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np
import pytest
import tvm
from native_harness import Callable, aligned, host_machine, unpadded
from winograd_weights import winograd_weights

from dvexport.targets import catalogue
from dvexport.targets.tvm.build.compile import _generate
from dvexport.targets.tvm.kernels.conv.winograd import (
    WinogradConv,
    part_floats,
    scratch_floats,
    spec_for,
    winograd_conv,
)
from dvexport.targets.tvm.kernels.conv.winograd_lists import (
    dense_tiles,
    tile_cells,
    winograd_shape,
)
from dvexport.targets.tvm.kernels.conv.winograd_points import interpolation
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.machine.machine import Machine, machine_of
from dvexport.targets.tvm.machine.parameters import parameters_of
from dvexport.targets.tvm.tuning.parameters import candidates

GUARD = 64
TOLERANCE = 5e-6
"""Relative to the largest output: twice what the interpolation points lose at 512 channels."""

BLOCKS = {16: (8, 8), 8: (8, 6, 4), 4: (6, 4, 3)}


@dataclasses.dataclass
class Case:
    """A convolution to do, and what it is done with."""

    spec: WinogradConv
    machine: Machine
    height: int
    width: int
    cin: int
    cout: int
    rows: list[int]
    cols: list[int]
    tiles: np.ndarray | None = None
    """Which of the dense list's tiles; all if none."""
    threads: int = 1


def machine(lanes: int) -> Machine:
    return dataclasses.replace(host_machine(), lanes=lanes)


@functools.cache
def compiled(spec: WinogradConv, lanes: int) -> Callable:
    return Callable(winograd_conv(spec, machine(lanes)), machine(lanes))


def channel_list(chosen: list[int], count: int) -> np.ndarray:
    made = np.full(1 + count, -1, np.int32)
    made[: 1 + len(chosen)] = len(chosen), *chosen
    return made


def chosen_tiles(dense: np.ndarray, chosen: np.ndarray, lanes: int) -> np.ndarray:
    """A tile list of some of a dense list's tiles, with the dense list's capacity."""
    capacity = dense[1]
    made = np.full(16 + 2 * capacity, -1, np.int32)
    made[:2] = -(-len(chosen) // lanes), capacity
    if len(chosen):
        for start in (16, 16 + capacity):
            picked = dense[start : start + capacity][chosen]
            made[start : start + made[0] * lanes] = np.pad(picked, (0, made[0] * lanes - len(chosen)), "edge")
    return made


def convolve(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Convolution with padding 1 in float64."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return np.tensordot(weights.astype(np.float64), windows, axes=([1, 2, 3], [0, 3, 4]))


def pixels_of(case: Case, count: int) -> np.ndarray:
    """Bool `[H, W]`: pixels of the chosen tiles."""
    m, across = case.spec.m, -(-case.width // case.spec.m)
    written = np.zeros((case.height, case.width), bool)
    for tile in range(count) if case.tiles is None else case.tiles:
        y, x = tile // across * m, tile % across * m
        written[y : y + m, x : x + m] = True
    return written


def check(case: Case, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    spec, lanes = case.spec, case.machine.lanes
    plane_in, plane_out = Plane((case.height, case.width)), Plane((case.height, case.width), 1 + seed % 2)
    x = rng.standard_normal((case.cin, case.height, case.width)).astype(np.float32)
    before, residual = rng.standard_normal((2, case.cout, case.height, case.width)).astype(np.float32)
    weights = rng.standard_normal((case.cout, case.cin, 3, 3)).astype(np.float32)
    bias = rng.standard_normal(case.cout).astype(np.float32)
    dense = dense_tiles(plane_in, plane_out, spec.m, case.machine)
    tiles = dense if case.tiles is None else chosen_tiles(dense, case.tiles, lanes)
    buffers = {"X": plane_in.pack(x), "U": winograd_weights(weights, spec.m), "B": bias}
    buffers |= {"R": unpadded(plane_out, residual)} if spec.residual else {}
    buffers |= {"inside": plane_out.inside()} if spec.inside else {}
    buffers |= {"rows": channel_list(case.rows, case.cout), "cols": channel_list(case.cols, case.cin), "tiles": tiles}
    vectors = -(-int(dense[1]) // lanes)
    scratch = np.full(scratch_floats(spec, case.cin, vectors, case.threads, case.machine), np.nan, np.float32)
    part = part_floats(spec, case.cin, vectors, case.machine)
    shape = winograd_shape(spec.m, plane_in, plane_out, case.cin, part)
    buffers |= {"scratch": scratch, "shape": shape, "Y": plane_out.pack(before)}
    held = {name: aligned(array, GUARD) for name, array in buffers.items()}
    kernel = compiled(spec, lanes)
    assert kernel.kernel.buffers == tuple(held)
    kernel(*held.values(), threads=case.threads)

    for name, array in held.items():
        assert_guards(name, array)
        assert name in ("scratch", "Y") or array.tobytes() == buffers[name].tobytes(), name
    full = convolve(x[case.cols], weights[:, case.cols]) + bias[:, None, None] + (residual if spec.residual else 0)
    full = np.maximum(full, 0) if spec.relu else full
    listed = np.isin(np.arange(case.cout), case.rows)
    written = listed[:, None, None] & pixels_of(case, -(-case.height // spec.m) * -(-case.width // spec.m))
    expected = np.where(written, full, before)
    got = plane_out.unpack(held["Y"])
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(full).max()
    assert np.array_equal(got[~written], before[~written])
    assert np.array_equal(plane_out.pack(got), held["Y"]), "padding written"


def assert_guards(name: str, array: np.ndarray) -> None:
    memory = array.base
    while memory.base is not None and isinstance(memory.base, np.ndarray):
        memory = memory.base
    memory = memory.view(np.uint8)
    start = array.ctypes.data - memory.ctypes.data
    assert (memory[:start] == 0xAA).all() and (memory[start + array.nbytes :] == 0xAA).all(), f"{name}: wrote outside"


def assembly(spec: WinogradConv, target: Machine) -> str:
    """The assembly text of a kernel, from the pipeline that makes its object."""
    kernel = winograd_conv(spec, target)
    module = _generate(tvm.IRModule({kernel.name: kernel.func}), tvm.target.Target(target.tvm_target))
    return module.inspect_source("asm")


def innermost_loops(text: str) -> list[str]:
    """Basic blocks that branch to their own label."""
    blocks = re.split(r"^(\.LBB\w+):", text, flags=re.MULTILINE)
    pairs = zip(blocks[1::2], blocks[2::2], strict=True)
    return [body for label, body in pairs if re.search(rf"\t(j|b|cbn?z)\S*\t(\w+, )?{re.escape(label)}$", body, re.M)]


def spec_of(m: int, lanes: int, height: int, width: int, *, residual: bool = False, relu: bool = True) -> WinogradConv:
    return WinogradConv(m, bool(height % m or width % m), residual, relu, BLOCKS[lanes])


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize(
    ("height", "width"), [(56, 56), (28, 28), (14, 14), (7, 7), (12, 12), (13, 13), (13, 18), (1, 5)]
)
def test_dense(lanes: int, m: int, height: int, width: int) -> None:
    cin, cout = 9, 13
    spec = spec_of(m, lanes, height, width)
    check(Case(spec, machine(lanes), height, width, cin, cout, list(range(cout)), list(range(cin))))


@pytest.mark.slow
def test_blocks_that_tune_may_choose() -> None:
    target, rng = host_machine(), np.random.default_rng(7)
    for block in candidates("winograd", parameters_of(target), target):
        spec = dataclasses.replace(spec_of(2, target.lanes, 28, 28), block=block)
        rows, cols = (sorted(rng.choice(40, count, replace=False).tolist()) for count in (29, 11))
        check(Case(spec, machine(target.lanes), 28, 28, 40, 40, rows, cols, threads=2))


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("m", [2, 4])
def test_random_subsets(lanes: int, m: int) -> None:
    rng = np.random.default_rng(lanes + m)
    residual, relu = True, lanes != 8
    for seed, (size, cin, cout) in enumerate([(28, 24, 40), (14, 33, 17), (13, 16, 9), (7, 64, 48), (56, 5, 12)]):
        spec = spec_of(m, lanes, size, size, residual=residual, relu=relu)
        count = (-(-size // m)) ** 2
        for threads in (1, 2, 3):
            rows = sorted(rng.choice(cout, rng.integers(1, cout + 1), replace=False).tolist())
            cols = sorted(rng.choice(cin, rng.integers(1, cin + 1), replace=False).tolist())
            tiles = np.sort(rng.choice(count, rng.integers(1, count + 1), replace=False))
            check(Case(spec, machine(lanes), size, size, cin, cout, rows, cols, tiles, threads), seed)


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("rows", "cols", "tiles"),
    [([], [1, 2], [0]), ([3], [], [0, 5]), ([3], [1], []), ([19], [6], [8]), ([0], list(range(7)), [0, 1, 2])],
)
def test_empty_and_single(m: int, threads: int, rows: list[int], cols: list[int], tiles: list[int]) -> None:
    spec = spec_of(m, 16, 12, 12, residual=True)
    check(Case(spec, machine(16), 12, 12, 7, 20, rows, cols, np.array(tiles, np.int64), threads))


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("cols", [1, 16, 37, 40])
def test_weights_asked_for_ahead(m: int, cols: int) -> None:
    """Inputs in turns of a cache line: fewer than one, one, some left over."""
    rng, spec = np.random.default_rng(cols), dataclasses.replace(spec_of(m, 16, 14, 14, residual=True), ahead=True)
    listed = sorted(rng.choice(40, cols, replace=False).tolist())
    check(Case(spec, machine(16), 14, 14, 40, 20, [0, 3, *range(5, 20)], listed), cols)


@pytest.mark.parametrize("m", [2, 4])
def test_threads_share_rows(m: int) -> None:
    """One vector of tiles: every thread has work only if output channels are shared."""
    cin, cout, lanes = 16, 64, 16
    for threads in (2, 3, 5):
        case = Case(spec_of(m, lanes, 7, 7), machine(lanes), 7, 7, cin, cout, list(range(cout)), list(range(cin)))
        case.threads = threads
        check(case)


@pytest.mark.parametrize("m", [2, 4])
def test_error_at_512_channels(m: int) -> None:
    lanes = 16
    case = Case(spec_of(m, lanes, 14, 14), machine(lanes), 14, 14, 512, 32, list(range(32)), list(range(512)))
    check(case)


@pytest.mark.parametrize("m", [2, 4])
def test_interpolation_is_convolution(m: int) -> None:
    rng = np.random.default_rng(m)
    x, w = rng.standard_normal(m + 2), rng.standard_normal(3)
    a, g, b = interpolation(m)
    assert np.allclose(a @ ((g @ w) * (b @ x)), np.correlate(x, w, "valid"), atol=1e-12)


@pytest.mark.parametrize(("size", "grid", "m"), [(56, 7, 4), (28, 7, 4), (14, 7, 2), (7, 4, 2), (56, 7, 2), (14, 2, 4)])
def test_cells(size: int, grid: int, m: int) -> None:
    plane_in, plane_out = Plane((size, size)), Plane((size, size), 2)
    cells = tile_cells(plane_in, plane_out, (grid, grid), m)
    if (size, grid, m) == (14, 2, 4):
        assert cells is None
        return
    assert cells is not None
    starts, offsets = cells[: grid * grid + 1], cells[grid * grid + 1 :].reshape(2, -1)
    owner = np.arange(size) * grid // size
    seen = np.zeros((size, size), int)
    for cell in range(grid * grid):
        for output, source in offsets[:, starts[cell] : starts[cell + 1]].T:
            y, x = divmod(output - plane_out.base, plane_out.pitch)
            assert source == plane_in.offset(y - 1, x - 1)
            seen[y : y + m, x : x + m] += 1
            assert (owner[y : y + m] == cell // grid).all() and (owner[x : x + m] == cell % grid).all()
    assert (seen == 1).all()
    dense = dense_tiles(plane_in, plane_out, m, machine(16))
    capacity = dense[1]
    for part, start in enumerate((16, 16 + capacity)):
        assert set(dense[start : start + capacity]) == set(offsets[part])


@pytest.mark.parametrize(
    ("size", "grid", "lanes", "m"),
    [
        (56, None, 16, 4),
        (28, None, 16, 4),
        (14, None, 16, 4),
        (7, None, 16, 2),
        (7, None, 4, 4),
        (56, 7, 16, 4),
        (28, 7, 16, 4),
        (14, 7, 16, 2),
        (7, 7, 16, None),
    ],
)
def test_spec_counts_lanes_without_tiles(size: int, grid: int | None, lanes: int, m: int | None) -> None:
    plane = Plane((size, size))
    spec = spec_for(plane, plane, grid and (grid, grid), machine(lanes), residual=False, relu=True)
    assert (spec and spec.m) == m
    assert spec is None or spec.inside == (size % spec.m != 0)


@pytest.mark.parametrize(
    ("name", "multiply_add"),
    [("rv1126", "vfma.f32"), ("raspberry-pi-4", "fmla"), ("x86-64-avx2", "vfmadd"), ("x86-64-avx512", "vfmadd")],
)
@pytest.mark.parametrize("m", [2, 4])
def test_products_stay_in_registers(name: str, multiply_add: str, m: int) -> None:
    """The largest register block is a loop of vector fused multiply-adds that does not touch the stack."""
    target = machine_of(catalogue.load(name).cpu)
    spec = spec_for(Plane((8 * m, 8 * m)), Plane((8 * m, 8 * m)), None, target, residual=False, relu=True)
    assert spec is not None
    spec = dataclasses.replace(spec, m=m)
    most = max(rows * count for count, rows in enumerate(spec.block, 1))
    loops = [loop for loop in innermost_loops(assembly(spec, target)) if loop.count(multiply_add) == most]
    assert loops
    assert any(not re.search(r"\bsp\b|%[er]sp", loop) for loop in loops)
