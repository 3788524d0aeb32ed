"""The gated direct convolution against a float64 reference: any window, size, list of channels, tiles and threads."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from native_harness import Callable, aligned, host_machine, unpadded

from dvexport.targets.tvm.build.compile import compile_kernel
from dvexport.targets.tvm.kernels.conv.direct import DirectConv, direct_conv, spec_for
from dvexport.targets.tvm.kernels.conv.direct_data import (
    Runs,
    Window,
    cell_bounds,
    dense_runs,
    direct_shape,
    direct_weights,
    run_list,
    scratch_floats,
    tile_runs,
)
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.machine.machine import Machine
from dvexport.targets.tvm.machine.parameters import parameters_of
from dvexport.targets.tvm.tuning.parameters import candidates

POINT, POINT_2 = Window((1, 1)), Window((1, 1), (2, 2))
SQUARE, SQUARE_2 = Window((3, 3), (1, 1), (1, 1)), Window((3, 3), (2, 2), (1, 1))
VALID, WIDE = Window((3, 3)), Window((3, 3), (1, 1), (2, 2), (2, 2))
STEM, FIVE = Window((7, 7), (2, 2), (3, 3)), Window((5, 5), (1, 1), (2, 2))
WINDOWS = {"1x1": POINT, "1x1 s2": POINT_2, "3x3": SQUARE, "3x3 s2": SQUARE_2, "3x3 p0": VALID, "3x3 d2": WIDE,
           "7x7 s2": STEM, "5x5": FIVE, "1x3": Window((1, 3), (1, 1), (0, 1))}  # fmt: skip
BLOCKS = {4: (5, 4), 8: (4, 3), 16: (8, 2)}
SPARE = 64


def machine(lanes: int) -> Machine:
    """The host, as if its vectors had some other length."""
    return Machine("x86_64-linux-gnu", host_machine().mcpu, (), lanes, BLOCKS[lanes])


@functools.cache
def load(spec: DirectConv, target: Machine) -> Callable:
    """A family, compiled once."""
    return Callable(direct_conv(spec, target), target)


@dataclass
class Layer:
    """A convolution with random weights, and a frame."""

    window: Window
    x: Plane
    y: Plane
    image: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    residual: np.ndarray

    @classmethod
    def random(cls, window: Window, size: tuple[int, int], channels: tuple[int, int], seed: int = 0) -> Layer:
        rng = np.random.default_rng(seed)
        out = [
            (size[axis] + 2 * window.pads[axis] - (window.kernel[axis] - 1) * window.dilations[axis] - 1)
            // window.strides[axis]
            + 1
            for axis in (0, 1)
        ]

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32)

        x, y = Plane(size, max(*window.pads, 1)), Plane(tuple(out), max(*window.pads, 1))
        cin, cout = channels
        return cls(
            window, x, y, normal(cin, *size), normal(cout, cin, *window.kernel), normal(cout), normal(cout, *out)
        )

    def reference(self, cols: np.ndarray, spec: DirectConv) -> np.ndarray:
        """Every output, in float64."""
        window, margin = self.window, 8
        image = np.pad(self.image.astype(np.float64), ((0, 0), (margin, margin), (margin, margin)))
        made = np.zeros((len(self.weights), self.y.height, self.y.width))
        for ky in range(window.kernel[0]):
            for kx in range(window.kernel[1]):
                top = margin - window.pads[0] + ky * window.dilations[0]
                left = margin - window.pads[1] + kx * window.dilations[1]
                rows = top + np.arange(self.y.height) * window.strides[0]
                columns = left + np.arange(self.y.width) * window.strides[1]
                seen = image[cols][:, rows[:, None], columns[None, :]]
                made += np.tensordot(self.weights[:, cols, ky, kx].astype(np.float64), seen, 1)
        made += self.bias[:, None, None]
        made += self.residual if spec.residual else 0
        return np.maximum(made, 0) if spec.relu else made

    def run(
        self, spec: DirectConv, target: Machine, rows: np.ndarray, cols: np.ndarray, runs: np.ndarray, threads: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the Y planes before and after a call; check that nothing around any buffer was written."""
        cout, cin = self.weights.shape[:2]
        options = {**spec.memory(target), "vectors": int(runs[1]) // (target.lanes // spec.run)}
        before = self.y.pack(np.random.default_rng(9).standard_normal(self.residual.shape).astype(np.float32))
        scratch = np.zeros(scratch_floats(self.window.size, cin, threads, **options), np.float32)
        given = {
            "X": self.x.pack(self.image) if any(self.window.pads) else unpadded(self.x, self.image),
            "W": direct_weights(self.weights),
            "B": self.bias,
            "R": unpadded(self.y, self.residual),
            "inside": self.y.inside(),
            "rows": channel_list(rows, cout),
            "cols": channel_list(cols, cin),
            "runs": runs,
            "scratch": scratch,
            "shape": direct_shape(self.x, self.y, self.window, (cin, cout), **options),
            "Y": before,
        }
        function = load(spec, target)
        arrays = {name: aligned(given[name], SPARE) for name in function.kernel.buffers}
        function(*arrays.values(), threads=threads)
        for name, array in arrays.items():
            around = np.frombuffer(array.base, np.uint8)
            start = array.ctypes.data - around.ctypes.data
            assert (around[:start] == 0xAA).all(), f"wrote before {name}"
            assert (around[start + array.nbytes :] == 0xAA).all(), f"wrote after {name}"
            assert name in ("scratch", "Y") or array.tobytes() == given[name].tobytes(), f"wrote to {name}"
        return before, arrays["Y"].copy()

    def check(
        self,
        spec: DirectConv,
        target: Machine,
        rows: np.ndarray,
        cols: np.ndarray,
        runs: Runs,
        cells: np.ndarray,
        pixels: np.ndarray,
        threads: int = 1,
    ) -> None:
        """Check a call: `pixels` (bool `[H, W]`) of `rows` are computed, everything else is as it was."""
        before, after = self.run(spec, target, rows, cols, run_list(runs, cells, target), threads)
        expected = self.y.unpack(before).astype(np.float64)
        reference = self.reference(cols, spec)
        for row in rows:
            expected[row][pixels] = reference[row][pixels]
        scale = max(1.0, float(np.abs(reference).max(initial=0)))
        assert np.abs(self.y.unpack(after) - expected).max() <= 2e-6 * scale
        assert not after[:, self.y.inside() == 0].any(), "wrote to the padding"
        untouched = np.setdiff1d(np.arange(len(before)), rows)
        assert np.array_equal(after[untouched], before[untouched])


def channel_list(channels: np.ndarray, total: int) -> np.ndarray:
    made = np.full(1 + total, -(10**6), np.int32)  # what is beyond the count must not be read
    made[: 1 + len(channels)] = [len(channels), *channels]
    return made


def some(total: int, count: int, seed: int = 0) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


def every(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    return np.ones(1, bool), np.ones((layer.y.height, layer.y.width), bool)


def pixels_of(cells: np.ndarray, layer: Layer) -> np.ndarray:
    """Which pixels active cells (bool `[gh, gw]`) cover, by the rule's text."""
    rows = np.arange(layer.y.height) * cells.shape[0] // layer.y.height
    columns = np.arange(layer.y.width) * cells.shape[1] // layer.y.width
    return cells[rows[:, None], columns[None, :]]


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("name", WINDOWS)
def test_window(name: str, lanes: int) -> None:
    target, window = machine(lanes), WINDOWS[name]
    layer = Layer.random(window, (13, 17), (5, 19))
    runs = dense_runs(layer.x, layer.y, window, target)
    spec = spec_for(window, runs, (5, 19), target, residual=False, relu=True)
    for threads in (1, 2, 3):
        layer.check(spec, target, np.arange(19), np.arange(5), runs, *every(layer), threads=threads)
    for rows, cols in ((0, 5), (1, 1), (7, 3), (19, 0), (2, 5)):
        layer.check(spec, target, some(19, rows), some(5, cols), runs, *every(layer), threads=2)


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize(("name", "size", "grid"), [
    ("3x3", (56, 56), (7, 7)), ("3x3", (14, 14), (7, 7)), ("3x3", (7, 7), (7, 7)), ("1x1", (28, 28), (7, 7)),
    ("3x3 s2", (28, 28), (7, 7)), ("3x3", (13, 17), (3, 4)), ("1x1 s2", (13, 17), (7, 9)), ("1x1", (3, 2), (7, 7)),
])  # fmt: skip
def test_tiles(name: str, size: tuple[int, int], grid: tuple[int, int], lanes: int) -> None:
    target, window = machine(lanes), WINDOWS[name]
    layer = Layer.random(window, size, (6, 11))
    runs = tile_runs(layer.x, layer.y, window, grid, target)
    spec = spec_for(window, runs, (6, 11), target, residual=False, relu=True)
    rng = np.random.default_rng(3)
    for share, threads in ((0.0, 1), (0.5, 1), (0.5, 2), (0.2, 3), (1.0, 1)):
        cells = rng.random(grid) < share
        rows, cols = some(11, int(rng.integers(12))), some(6, int(rng.integers(7)))
        layer.check(spec, target, rows, cols, runs, cells.ravel(), pixels_of(cells, layer), threads=threads)
    one = np.zeros(grid, bool)
    one[-1, -1] = True
    layer.check(spec, target, np.arange(11), np.arange(6), runs, one.ravel(), pixels_of(one, layer))


@pytest.mark.slow
@pytest.mark.parametrize("parameter", ["planes", "packed", "tall"])
def test_blocks_that_tune_may_choose(parameter: str) -> None:
    target = host_machine()
    layer = Layer.random(SQUARE, (13, 17), (5, 23))
    runs = dense_runs(layer.x, layer.y, SQUARE, target)
    own = replace(parameters_of(target), small_plane=0 if parameter == "planes" else 1 << 20)
    for value in candidates(parameter, own, target):
        tuned = replace(target, parameters=replace(own, **{parameter: value}))
        spec = spec_for(SQUARE, runs, (5, 23), tuned, residual=True, relu=True)
        assert spec.packed == (parameter != "planes")
        for rows in (23, 9, 1):
            layer.check(spec, target, some(23, rows), some(5, 3), runs, *every(layer), threads=2)


@pytest.mark.parametrize(("residual", "relu"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("grid", [None, (2, 2)])
def test_families(residual: bool, relu: bool, packed: bool, grid: tuple[int, int] | None) -> None:
    target = machine(8)
    layer = Layer.random(SQUARE, (10, 16), (4, 9))
    if grid is None:
        runs = dense_runs(layer.x, layer.y, SQUARE, target)
        cells, pixels = every(layer)
    else:
        runs = tile_runs(layer.x, layer.y, SQUARE, grid, target)
        on = np.array([[True, False], [False, True]])
        cells, pixels = on.ravel(), pixels_of(on, layer)
    spec = DirectConv(0 if packed else 9, 1, runs.run, runs.inside, residual, relu, packed, target.block)
    layer.check(spec, target, some(9, 5), some(4, 3), runs, cells, pixels, threads=2)


def test_rows_outer() -> None:
    """Weights beyond the cache: rows are the outer loop, and what threads share."""
    target = machine(16)
    layer = Layer.random(SQUARE, (7, 7), (120, 130))
    runs = dense_runs(layer.x, layer.y, SQUARE, target)
    spec = spec_for(SQUARE, runs, (120, 130), target, residual=True, relu=True)
    for threads in (1, 2, 3):
        layer.check(spec, target, some(130, 77), some(120, 61), runs, *every(layer), threads=threads)


def test_blocks_of_panels() -> None:
    """More packed windows than a block holds."""
    target = machine(16)
    layer = Layer.random(SQUARE_2, (41, 45), (90, 5))
    runs = dense_runs(layer.x, layer.y, SQUARE_2, target)
    spec = spec_for(SQUARE_2, runs, (90, 5), target, residual=False, relu=True)
    for cols in (90, 33):
        layer.check(spec, target, np.arange(5), some(90, cols), runs, *every(layer), threads=1)


@pytest.mark.parametrize("lanes", [4, 16])
@pytest.mark.parametrize(("rows", "vectors"), [(512, 4), (3, 40), (64, 64), (1, 1), (9, 2)])
def test_threads_share_fairly(lanes: int, rows: int, vectors: int) -> None:
    """Each of 4 threads writes at most a fair share and one register block of outputs."""
    target = machine(lanes)
    layer = Layer.random(POINT, (1, vectors * lanes), (1, rows))
    layer.image[:] = 1
    layer.bias += 100
    runs = tile_runs(layer.x, layer.y, POINT, (1, 1), target)
    spec = spec_for(POINT, runs, (1, rows), target, residual=False, relu=True)
    function = load(spec, target)
    options = spec.memory(target)
    written = []
    for part in range(4):
        out = aligned(np.zeros((rows, layer.y.size), np.float32))
        arrays = [
            layer.x.pack(layer.image), direct_weights(layer.weights), layer.bias, channel_list(np.arange(rows), rows),
            channel_list(np.arange(1), 1), run_list(runs, np.ones(1, bool), target),
            np.zeros(scratch_floats(1, 1, 4, **options), np.float32),
            direct_shape(layer.x, layer.y, POINT, (1, rows), **options),
        ]  # fmt: skip
        run_part(function, [*map(aligned, arrays), out], part, 4)
        written.append(np.count_nonzero(out))
    assert sum(written) == rows * vectors * lanes
    smallest = min(-(-rows // 4) * vectors, rows * -(-vectors // 4))
    assert max(written) <= smallest * lanes


def run_part(function: Callable, arrays: list[np.ndarray], part: int, parts: int) -> None:
    """One thread's share of a call."""
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    function._function(*pointers, ctypes.c_int32(part), ctypes.c_int32(parts))


def test_weights_keep_out_of_each_others_cache_sets() -> None:
    weights = np.random.default_rng(0).standard_normal((5, 64, 3, 3)).astype(np.float32)
    rows = direct_weights(weights)
    assert rows.shape == (5, 64 * 9 + 16)
    assert np.array_equal(rows[:, : 64 * 9].reshape(weights.shape), weights)


def test_cells_cover_a_plane_by_the_rule() -> None:
    for cells, size in ((7, 56), (3, 13), (7, 7), (7, 3), (1, 5)):
        for cell, (start, stop) in enumerate(cell_bounds(cells, size)):
            assert [pixel for pixel in range(size) if pixel * cells // size == cell] == list(range(start, stop))


@pytest.mark.parametrize("grid", [(7, 7), (3, 4), (1, 1)])
def test_tile_table(grid: tuple[int, int]) -> None:
    """The table for the list kernel: starts, then offsets of exactly the cell's pixels."""
    target = machine(16)
    x, y = Plane((26, 34)), Plane((13, 17))
    runs = tile_runs(x, y, SQUARE_2, grid, target)
    table = runs.table()
    cells = grid[0] * grid[1]
    starts, offsets = table[: cells + 1], table[cells + 1 :].reshape(2, -1)
    assert table.dtype == np.int32
    assert starts[-1] == offsets.shape[1]
    for cell in range(cells):
        covered = {int(at) + i for at in offsets[0, starts[cell] : starts[cell + 1]] for i in range(runs.run)}
        wanted = {
            y.offset(row, column)
            for row in range(13)
            for column in range(17)
            if (row * grid[0] // 13) * grid[1] + column * grid[1] // 17 == cell
        }
        assert covered == wanted
    row, column = divmod(offsets[0] - y.base, y.pitch)
    assert np.array_equal(offsets[1], x.base + (2 * row - 1) * x.pitch + 2 * column - 1)


def test_windows_beyond_the_padding_are_refused() -> None:
    with pytest.raises(ValueError, match="beyond the padding"):
        dense_runs(Plane((8, 8)), Plane((8, 8)), FIVE, machine(8))


@pytest.mark.parametrize("changes", [
    {"run": 3}, {"step": 3}, {"taps": 4}, {"run": 4, "inside": True}, {"step": 2}, {"taps": 9, "packed": True},
    {"columns": 7}, {"columns": 7, "packed": True, "taps": 0},
])  # fmt: skip
def test_impossible_families_are_refused(changes: dict[str, int]) -> None:
    spec = DirectConv(9, 1, 8, inside=False, residual=False, relu=False, packed=False, block=(4, 3))
    with pytest.raises(ValueError, match=r"no direct convolution|runs shorter|only runs|even and odd"):
        direct_conv(replace(spec, **changes), machine(8))


@pytest.mark.parametrize(("processor", "spec"), [
    ("cortex-a72", DirectConv(0, 1, 4, False, True, True, packed=True, block=(5, 4))),
    ("cortex-a53", DirectConv(1, 2, 4, False, False, True, packed=True, block=(5, 4))),
    ("neoverse-n1", DirectConv(9, 1, 4, True, False, True, packed=False, block=(5, 4))),
])  # fmt: skip
def test_aarch64_inner_loop(processor: str, spec: DirectConv, tmp_path: Path) -> None:
    """The largest loop multiplies by lanes of weights, and touches no stack."""
    disassemble = shutil.which("llvm-objdump") or shutil.which("aarch64-linux-gnu-objdump")
    if disassemble is None:
        pytest.skip("no disassembler for AArch64")
    target = Machine("aarch64-linux-gnu", processor, (), 4, (5, 4))
    path = tmp_path / "kernel.o"
    path.write_bytes(compile_kernel(direct_conv(spec, target), target))
    text = subprocess.run([disassemble, "-d", str(path)], check=True, capture_output=True, text=True).stdout
    loop = max(inner_loops(text), key=lambda lines: sum("fmla" in line for line in lines))
    multiply = [line for line in loop if "fmla" in line]
    assert len(multiply) >= 20
    assert len(multiply) >= 0.6 * len(loop)
    assert all(re.search(r"\.s\[[0-3]\]", line) for line in multiply)
    assert not [line for line in loop if "[sp" in line]


def inner_loops(text: str) -> list[list[str]]:
    """Instructions of the loops of a disassembly that hold no other loop."""
    lines = [match for match in map(re.compile(r"\s*([0-9a-f]+):\s.*").match, text.splitlines()) if match]
    index = {int(line[1], 16): at for at, line in enumerate(lines)}
    loops = []
    for at, line in enumerate(lines):
        jump = re.search(r"\b(?:b\.\w+|cbn?z|tbn?z|b)\s.*?0x([0-9a-f]+) <", line[0])
        if jump and index.get(int(jump[1], 16), at + 1) <= at:
            loops.append((index[int(jump[1], 16)], at))
    inner = [loop for loop in loops if not any(loop != o and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)]
    return [[lines[at][0] for at in range(start, stop + 1)] for start, stop in inner]
