"""The kernels that can do a convolution: the only place that says which they are, for plans and for measurements.

Where several kernels fit, all of them are in the plan with their cost models, and the runtime takes the cheapest for
the counts of the moment. One of them is for the moment when every tile is active: a plane without holes is read in
whole vectors.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from dvexport.targets.tvm.calls import costs
from dvexport.targets.tvm.calls.memory import Constants, Part, Recipe
from dvexport.targets.tvm.kernels.abi import Kernel
from dvexport.targets.tvm.kernels.conv import direct, direct_data, winograd, winograd_lists
from dvexport.targets.tvm.kernels.conv.direct import DirectConv
from dvexport.targets.tvm.kernels.conv.direct_data import Runs, Window
from dvexport.targets.tvm.kernels.conv.winograd import WinogradConv
from dvexport.targets.tvm.kernels.conv.winograd_points import weight_matrix
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.machine.machine import Machine

__all__ = ["ConvLayer", "Option", "options_of"]

_WHOLE = 0.95
"""Expected time of the kernel over a whole plane, by that over tiles: 0.8 to 1 measured on x86-64 with 16 lanes."""

_SQUARE = Window((3, 3), (1, 1), (1, 1))
"""What Winograd's algorithm is for."""

_ONE = (1, 1)
"""The grid of a whole image."""


@dataclass(frozen=True)
class ConvLayer:
    """What decides which kernels fit a convolution.

    Attributes:
        x, y: layout of the input and output planes.
        window: the geometry.
        channels: input and output channels.
        grid: rows and columns of its gate's cells; None: nobody chooses among pixels.
        residual: whether another image is added.
        relu: whether the activation is a ReLU.
    """

    x: Plane
    y: Plane
    window: Window
    channels: tuple[int, int]
    grid: tuple[int, int] | None
    residual: bool
    relu: bool

    def runs(self, machine: Machine) -> Runs:
        """Return the runs of every cell, or of the whole image."""
        if self.grid is None:
            return direct_data.dense_runs(self.x, self.y, self.window, machine)
        return direct_data.tile_runs(self.x, self.y, self.window, self.grid, machine)

    def may_be_winograd(self, machine: Machine, algorithms: Collection[str]) -> bool:
        """Tell whether Winograd's algorithm is worth a try."""
        enough = self.channels[1] >= machine.block[0]
        return "winograd" in algorithms and self.window == _SQUARE and enough


@dataclass(frozen=True)
class Option:
    """A kernel that can do a convolution.

    Attributes:
        layer: the convolution.
        spec: what the kernel is generated for.
        runs: what it computes, cell by cell: runs of pixels, or Winograd's tiles as runs of one lane.
        vectors: how many the direct kernel has over tiles, or over the image where there are none: costs count in
            these.
        tiles: for a Winograd kernel, how its vectors follow from those.
        cost: its cost model.
        only: vectors of active tiles that it is for; 0: any number.
    """

    layer: ConvLayer
    spec: DirectConv | WinogradConv
    runs: Runs
    vectors: int
    tiles: costs.TileVectors
    cost: costs.Cost
    only: int = 0

    @property
    def m(self) -> int:
        """Edge of an output tile of a Winograd kernel; 0 of a direct one."""
        return self.spec.m if isinstance(self.spec, WinogradConv) else 0

    def kernel(self, machine: Machine) -> Kernel:
        """Return the kernel itself."""
        return _kernel(self.spec, machine)

    def weights(self, weight: np.ndarray, constants: Constants) -> Part:
        """Return where weights `[Cout, Cin, kh, kw]` are as the kernel reads them.

        Those of Winograd's algorithm are made of the direct kernel's when a plan is opened.
        """
        rows = direct_data.direct_weights(weight)
        source = constants.add(rows, of=weight)
        if isinstance(self.spec, DirectConv):
            return source
        matrix, target_row = weight_matrix(self.m), winograd_lists.row_floats(self.m, weight.shape[1])
        (points, edge), (cout, cin) = matrix.shape, weight.shape[:2]
        recipe = Recipe(source, constants.add(matrix), points, edge, cout, cin, rows.shape[1], target_row)
        return constants.derive(recipe)

    def scratch(self, machine: Machine, threads: int) -> int:
        """Return the floats of working memory that the kernel needs."""
        layer, spec = self.layer, self.spec
        if isinstance(spec, DirectConv):
            how = {**spec.memory(machine), "vectors": self._own_vectors(machine)}
            return direct_data.scratch_floats(layer.window.size, layer.channels[0], threads, **how)
        return winograd.scratch_floats(spec, layer.channels[0], self._own_vectors(machine), threads, machine)

    def shape(self, machine: Machine) -> np.ndarray:
        """Return the constant `shape` of the kernel."""
        layer, spec = self.layer, self.spec
        if isinstance(spec, DirectConv):
            how = {**spec.memory(machine), "vectors": self._own_vectors(machine)}
            return direct_data.direct_shape(layer.x, layer.y, layer.window, layer.channels, **how)
        part = winograd.part_floats(spec, layer.channels[0], self._own_vectors(machine), machine)
        return winograd_lists.winograd_shape(spec.m, layer.x, layer.y, layer.channels[0], part)

    def _own_vectors(self, machine: Machine) -> int:
        return self.runs.vectors(machine.lanes)


@functools.cache
def _kernel(spec: DirectConv | WinogradConv, machine: Machine) -> Kernel:
    return direct.direct_conv(spec, machine) if isinstance(spec, DirectConv) else winograd.winograd_conv(spec, machine)


def options_of(layer: ConvLayer, machine: Machine, algorithms: Collection[str]) -> Iterator[Option]:
    """Yield every kernel that can do a convolution.

    The direct one comes first: its list stands for the pixels in costs.

    Args:
        layer: the convolution.
        machine: what kernels are generated for.
        algorithms: to choose from; see `draft.ALGORITHMS`.
    """
    runs = layer.runs(machine)
    spec = direct.spec_for(layer.window, runs, layer.channels, machine, residual=layer.residual, relu=layer.relu)
    vectors = runs.vectors(machine.lanes)
    cost = costs.conv_cost(spec, layer.window.size, costs.TileVectors(), layer.channels[0], machine)
    first = Option(layer, spec, runs, vectors, costs.TileVectors(), cost)
    yield first
    tiled = _winograd(layer, layer.grid, vectors, machine) if layer.may_be_winograd(machine, algorithms) else None
    if tiled is not None:
        yield tiled
    if layer.grid is not None and _tells_all(np.diff(runs.starts), machine.lanes // spec.run):
        yield from _whole_plane(first, tiled, machine, algorithms)


def _tells_all(cells: np.ndarray, pieces: int) -> bool:
    """Tell whether the number of vectors says that every tile is active: a tile less has to be a vector less.

    Args:
        cells: runs of every tile.
        pieces: runs of a vector.
    """
    total = int(cells.sum())
    return -(-(total - int(cells[cells > 0].min())) // pieces) < -(-total // pieces)


def _winograd(
    layer: ConvLayer, grid: tuple[int, int] | None, vectors: int, machine: Machine, only: int = 0
) -> Option | None:
    """Return the Winograd kernel over the tiles of a grid, or over those of the image; None if none fits."""
    spec = winograd.spec_for(layer.x, layer.y, grid, machine, residual=layer.residual, relu=layer.relu)
    if spec is None:
        return None
    runs = _tiles(layer, grid or _ONE, spec.m)
    per = costs.tile_vectors(np.diff(runs.starts).tolist(), vectors, machine.lanes)
    cost = costs.conv_cost(spec, layer.window.size, per, layer.channels[0], machine)
    return Option(layer, spec, runs, vectors, per, cost, only)


def _tiles(layer: ConvLayer, grid: tuple[int, int], m: int) -> Runs:
    """Return the Winograd tiles of every cell of a grid, as runs of one lane."""
    table, cells = winograd_lists.tile_cells(layer.x, layer.y, grid, m), grid[0] * grid[1]
    assert table is not None
    starts, offsets = table[: cells + 1], table[cells + 1 :].reshape(2, -1)
    return Runs(1, False, starts, *offsets)


def _whole_plane(
    tiled: Option, cells: Option | None, machine: Machine, algorithms: Collection[str]
) -> Iterator[Option]:
    """Yield kernels over all pixels that can do better than those over tiles. They fit only if every tile is active.

    Args:
        tiled: the direct kernel over tiles.
        cells: the Winograd kernel over tiles, if there is one.
        machine: what kernels are generated for.
        algorithms: to choose from.
    """
    layer, vectors = tiled.layer, tiled.vectors
    runs = direct_data.dense_runs(layer.x, layer.y, layer.window, machine)
    if runs.inside:  # may be more vectors than those of the tiles, as they cover the padding too
        whole = direct.spec_for(layer.window, runs, layer.channels, machine, residual=layer.residual, relu=layer.relu)
        cost = tuple(_WHOLE * factor for factor in tiled.cost)
        yield Option(layer, whole, runs, vectors, costs.TileVectors(), cost, only=vectors)
    if not layer.may_be_winograd(machine, algorithms):
        return
    square = _winograd(layer, None, vectors, machine, only=vectors)
    if square is not None and (cells is None or square.m != cells.m):
        yield square
