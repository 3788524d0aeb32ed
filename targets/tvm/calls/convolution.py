"""Calls of a convolution: its lists, its memory, and the kernels that can do it.

What a gate decides becomes three lists: output channels, input channels, and runs of pixels (for Winograd, tiles). The
same list is made once, however many convolutions read it. Where several kernels fit, all of them are in the plan
with their cost models, and the runtime takes the cheapest for the counts of the moment. One of them is for the moment
when every tile is active: a plane without holes is read in whole vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dvexport.graph.graph import static_shape
from dvexport.targets.tvm.calls import costs
from dvexport.targets.tvm.calls.decisions import channel_list, run_list
from dvexport.targets.tvm.calls.memory import Part
from dvexport.targets.tvm.calls.program import Program, Way
from dvexport.targets.tvm.kernels.abi import Kernel
from dvexport.targets.tvm.kernels.conv import direct, direct_data, winograd, winograd_lists
from dvexport.targets.tvm.kernels.conv.direct_data import Runs, Window
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.machine.machine import Machine
from dvexport.targets.tvm.units.cut import ConvUnit

__all__ = ["write_conv"]

_WHOLE = 0.95
"""Expected time of the kernel over a whole plane, by that over tiles: 0.8 to 1 measured on x86-64 with 16 lanes."""

_SQUARE = Window((3, 3), (1, 1), (1, 1))
"""What Winograd's algorithm is for."""


@dataclass(frozen=True)
class _Layer:
    """What all frames of a convolution share."""

    unit: ConvUnit
    x: Plane
    y: Plane
    window: Window
    grid: tuple[int, int] | None

    @property
    def channels(self) -> tuple[int, int]:
        """Input and output channels."""
        return self.unit.weight.shape[1], self.unit.weight.shape[0]


def write_conv(program: Program, unit: ConvUnit) -> None:
    """Write the calls of a convolution, one for each frame."""
    frames = static_shape(unit.output)[0]
    layer = _layer(program, unit)
    x = program.planes(unit.x)
    residual = None if unit.residual is None else program.planes(unit.residual)
    target = _target(program, layer)
    for index in range(frames):

        def cut(part: Part | None, index: int = index) -> Part | None:
            return None if part is None else program.frame(part, frames, index)

        _write_frame(program, layer, index, cut(x), cut(residual), cut(target))  # type: ignore[arg-type]


def _layer(program: Program, unit: ConvUnit) -> _Layer:
    kernel = unit.weight.shape[2], unit.weight.shape[3]
    window = Window(kernel, unit.strides, (unit.pads[0], unit.pads[1]), unit.dilations)
    grid = None
    if unit.tiles is not None:
        _, rows, columns = static_shape(unit.tiles)
        grid = rows, columns
    return _Layer(unit, program.layout(unit.x), program.layout(unit.output), window, grid)


def _target(program: Program, layer: _Layer) -> Part:
    """Return the memory of the output, what is not computed already in it."""
    unit = layer.unit
    if unit.rows is None and unit.tiles is None:
        covered = _runs(layer, program.machine).inside and not _may_be_winograd(program, layer)
        return program.new_planes(
            unit.output, fragile=True, covered=covered, partial=not program.reads_padding(unit.output)
        )
    if unit.base is None:
        target = program.new_planes(unit.output)
        program.clear(target, f"{unit.output.name}", unit.gate)
        return target
    base = program.planes(unit.base)
    if program.may_overwrite(unit.base, unit) and unit.residual is not unit.base:
        program.take_over(unit.output, unit.base)
        return program.planes(unit.output)
    target = program.new_planes(unit.output)
    program.copy(base, target, f"{unit.base.name} to {unit.output.name}", unit.gate)
    return target


def _write_frame(program: Program, layer: _Layer, index: int, x: Part, residual: Part | None, target: Part) -> None:
    unit = layer.unit
    cin, cout = layer.channels
    rows = channel_list(program, unit.rows, cout, index)
    cols = channel_list(program, unit.cols, cin, index)
    options = list(_options(program, layer, index, residual is not None))
    vectors = options[0].vectors
    counts = (
        None if unit.rows is None else rows,
        None if unit.cols is None else cols,
        None if unit.tiles is None else options[0].pixels,
    )
    if counts == (None, None, None):
        options = [min(options, key=lambda option: costs.evaluate(option.cost, cout, cin, vectors))]
    given = (None if counts[0] else cout, None if counts[1] else cin, None if counts[2] else vectors)
    scratch = program.scratch(max(option.scratch for option in options))  # one of them runs
    ways = [_way(program, layer, option, x, residual, rows, cols, target, scratch, given) for option in options]
    program.choose(ways, f"conv {unit.output.name}", unit.gate, counts)


@dataclass(frozen=True)
class _Option:
    """A kernel that can do a convolution.

    Attributes:
        pixels: its list of runs or tiles.
        vectors: of the direct kernel, over the whole image.
        scratch: floats.
        only: vectors of active tiles that it is for; 0: any number.
    """

    kernel: Kernel
    weights: np.ndarray
    pixels: Part
    vectors: int
    scratch: int
    shape: np.ndarray
    cost: costs.Cost
    only: int = 0


def _options(program: Program, layer: _Layer, index: int, residual: bool) -> Iterator[_Option]:
    """Yield every kernel that can do a convolution, the direct one first: its list stands for the pixels in costs."""
    unit, machine, channels = layer.unit, program.machine, layer.channels
    runs = _runs(layer, machine)
    spec = direct.spec_for(layer.window, runs, channels, machine, residual=residual, relu=unit.relu)
    vectors = runs.vectors(machine.lanes)
    cost = costs.direct_cost(spec, layer.window.size, layer.channels[0], machine)
    yield _direct(program, layer, spec, _pixels(program, layer, index, runs), vectors, cost)
    tiled = None
    if _may_be_winograd(program, layer):
        tiled = winograd.spec_for(layer.x, layer.y, layer.grid, machine, residual=residual, relu=unit.relu)
        if tiled is not None:
            pixels = _tiles(program, layer, index, tiled.m)
            yield _winograd(program, layer, tiled, layer.grid, pixels, vectors)
    if layer.grid is not None and _tells_all(np.diff(runs.starts), machine.lanes // spec.run):
        yield from _whole_plane(program, layer, spec, tiled, vectors)


def _may_be_winograd(program: Program, layer: _Layer) -> bool:
    enough = layer.channels[1] >= program.machine.block[0]
    return "winograd" in program.algorithms and layer.window == _SQUARE and enough


def _tells_all(cells: np.ndarray, pieces: int) -> bool:
    """Tell whether the number of vectors says that every tile is active: a tile less has to be a vector less.

    Args:
        cells: runs of every tile.
        pieces: runs of a vector.
    """
    total = int(cells.sum())
    return -(-(total - int(cells[cells > 0].min())) // pieces) < -(-total // pieces)


def _direct(
    program: Program,
    layer: _Layer,
    spec: direct.DirectConv,
    pixels: Part,
    vectors: int,
    cost: costs.Cost,
    only: int = 0,
) -> _Option:  # fmt: skip
    """Return a direct kernel over the runs of tiles, or over those of the image."""
    machine, how = program.machine, {**spec.memory(program.machine), "vectors": vectors}
    return _Option(
        direct.direct_conv(spec, machine),
        direct_data.direct_weights(layer.unit.weight),
        pixels,
        vectors,
        direct_data.scratch_floats(layer.window.size, layer.channels[0], program.threads, **how),
        direct_data.direct_shape(layer.x, layer.y, layer.window, layer.channels, **how),
        cost,
        only,
    )


def _winograd(
    program: Program, layer: _Layer, spec: winograd.WinogradConv, grid: tuple[int, int] | None, pixels: Part,
    vectors: int, only: int = 0,
) -> _Option:  # fmt: skip
    """Return a Winograd kernel over the tiles of a grid, or over those of the image."""
    machine, (cin, _) = program.machine, layer.channels
    cells = _tiles_of_cells(layer, grid, spec.m)
    most = -(-sum(cells) // machine.lanes)
    part = winograd.part_floats(spec, cin, most, machine)
    tiles = costs.tile_vectors(cells, vectors, machine.lanes)
    return _Option(
        winograd.winograd_conv(spec, machine),
        winograd_lists.winograd_weights(layer.unit.weight, spec.m),
        pixels,
        vectors,
        winograd.scratch_floats(spec, cin, most, program.threads, machine),
        winograd_lists.winograd_shape(spec.m, layer.x, layer.y, cin, part),
        costs.winograd_cost(spec, tiles, cin, machine),
        only,
    )


def _whole_plane(
    program: Program, layer: _Layer, tiled: direct.DirectConv, cells: winograd.WinogradConv | None, vectors: int
) -> Iterator[_Option]:
    """Yield kernels over all pixels that can do better than those over tiles. They fit only if every tile is active.

    Args:
        tiled: the direct kernel over tiles.
        cells: the Winograd kernel over tiles, if there is one.
        vectors: of the direct kernel over all tiles.
    """
    unit, machine, channels = layer.unit, program.machine, layer.channels
    runs = direct_data.dense_runs(layer.x, layer.y, layer.window, machine)
    if runs.inside:
        spec = direct.spec_for(layer.window, runs, channels, machine, residual=tiled.residual, relu=unit.relu)
        pixels = program.constants.add(direct_data.run_list(runs, np.ones(1, bool), machine))
        cost = tuple(_WHOLE * factor for factor in costs.direct_cost(tiled, layer.window.size, channels[0], machine))
        whole = runs.vectors(machine.lanes)  # may be more than those of the tiles, as they cover the padding too
        yield _direct(program, layer, spec, pixels, whole, cost, only=vectors)
    if not _may_be_winograd(program, layer):
        return
    square = winograd.spec_for(layer.x, layer.y, None, machine, residual=tiled.residual, relu=unit.relu)
    if square is not None and (cells is None or square.m != cells.m):
        tiles = winograd_lists.dense_tiles(layer.x, layer.y, square.m, machine)
        yield _winograd(program, layer, square, None, program.constants.add(tiles), vectors, only=vectors)


def _way(
    program: Program, layer: _Layer, option: _Option, x: Part, residual: Part | None, rows: Part, cols: Part,
    target: Part, scratch: Part, given: tuple[float | None, float | None, float | None],
) -> Way:  # fmt: skip
    """Return an option's call; counts that no gate decides are folded into its cost model."""
    constants = program.constants
    weights = constants.add(option.weights)
    parts = {
        "X": x, "W": weights, "U": weights, "B": constants.add(layer.unit.bias.astype(np.float32)), "R": residual,
        "inside": constants.add(layer.y.inside()), "rows": rows, "cols": cols, "runs": option.pixels,
        "tiles": option.pixels, "scratch": scratch, "shape": constants.add(option.shape),
        "Y": target,
    }  # fmt: skip
    arguments = tuple(parts[name] for name in option.kernel.buffers)
    return Way(option.kernel, arguments, costs.fixed(option.cost, *given), option.only)  # type: ignore[arg-type]


def _runs(layer: _Layer, machine: Machine) -> Runs:
    if layer.grid is None:
        return direct_data.dense_runs(layer.x, layer.y, layer.window, machine)
    return direct_data.tile_runs(layer.x, layer.y, layer.window, layer.grid, machine)


def _pixels(program: Program, layer: _Layer, index: int, runs: Runs) -> Part:
    """Return the run list of a frame's active tiles, or of the whole image."""
    tiles = layer.unit.tiles
    if tiles is None:
        return program.constants.add(direct_data.run_list(runs, np.ones(1, bool), program.machine))
    return run_list(program, tiles, index, runs.table(), runs.run)


def _tiles_of_cells(layer: _Layer, grid: tuple[int, int] | None, m: int) -> list[int]:
    """Return the Winograd tiles of each cell of a grid; without a grid those of the image."""
    grid = grid or (1, 1)
    table = winograd_lists.tile_cells(layer.x, layer.y, grid, m)
    assert table is not None
    return [int(count) for count in np.diff(table[: grid[0] * grid[1] + 1])]


def _tiles(program: Program, layer: _Layer, index: int, m: int) -> Part:
    """Return the list of a frame's active Winograd tiles, or of the whole image."""
    tiles = layer.unit.tiles
    if tiles is None:
        return program.constants.add(winograd_lists.dense_tiles(layer.x, layer.y, m, program.machine))
    assert layer.grid is not None
    table = winograd_lists.tile_cells(layer.x, layer.y, layer.grid, m)
    assert table is not None
    return run_list(program, tiles, index, table, 1)
