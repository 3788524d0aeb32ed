"""Convolve chosen pixels as matrix products over gathered pixel rows: what `lower_tiles` is made of.

    Y[pixels] = act( Gather(X, windows[pixels]) W + B ),      W: [kh*kw*Cin, Cout] constant

For even tiles of stride-1 3x3 convolutions the product can be Winograd's (`dvexport.passes.tiles.winograd`),
which gathers 2.25 (F(4,3)) or 4 (F(2,3)) instead of 9 rows a pixel and multiplies 4 or 2.25 times less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from dvexport.dialect.conv import activate, plane_size
from dvexport.dialect.rows import rows_shape
from dvexport.dialect.spec import specification
from dvexport.errors import PassError
from dvexport.graph.graph import DV, Builder, array_of, static_shape
from dvexport.passes.tiles.pixel_tables import tile_pixels, windows, winograd_tiles
from dvexport.passes.tiles.winograd import WINOGRAD_STEPS, transforms, winograd_applies, winograd_weight

__all__ = ["Compact", "Place", "convolve", "from_rows", "to_rows"]


@dataclass(frozen=True)
class Place:
    """Where a node computes: its output plane and the tiles chosen on it."""

    frames: int
    channels: int
    size: tuple[int, int]
    grid: tuple[int, int]
    tiles: ir.Value

    @classmethod
    def of(cls, node: ir.Node, tiles: ir.Value | None) -> Place:
        """Return the place of a node's first output; PassError without tiles."""
        if tiles is None:
            raise PassError("a tile lowering needs a tile mask", where=node.name)
        frames, channels, *size = static_shape(node.outputs[0])
        grid = static_shape(tiles)[1:]
        return cls(frames, channels, (size[0], size[1]), (grid[0], grid[1]), tiles)

    @property
    def rows(self) -> tuple[int, int]:
        """Shape of the plane as pixel rows."""
        return rows_shape((self.frames, self.channels, *self.size))

    @property
    def cells(self) -> np.ndarray:
        """Output pixels (y, x) of each cell."""
        return tile_pixels(self.size, self.grid)

    def active(self, build: Builder) -> ir.Value:
        """The active cells over all frames, `[1, n]` as NonZero lists them."""
        return build.op("NonZero", build.op("Reshape", self.tiles, build.ints(-1)))

    def pixels(self, build: Builder, active: ir.Value) -> ir.Value:
        """The pixels of the active cells as rows of the output plane, `[1, n, k]`."""
        table = windows(self.cells, self.size, self.frames, (1, 1))[..., 0]
        return build.op("Gather", build.const(table), active, axis=0)


@dataclass(frozen=True)
class Compact:
    """Merged activation: `rows` `[n + 1, C]`, a zero row last; `index` maps a pixel to its row, or to -1, the last."""

    rows: ir.Value
    index: ir.Value


def to_rows(build: Builder, value: ir.Value) -> ir.Value:
    """View a plane as pixel rows."""
    return build.op("ToRows", value, domain=DV, shape=rows_shape(static_shape(value)), dtype=value.dtype)


def from_rows(build: Builder, rows: ir.Value, size: tuple[int, int]) -> ir.Value:
    """View pixel rows as a plane."""
    return build.op("FromRows", rows, domain=DV, size=list(size))


def convolve(
    build: Builder, node: ir.Node, choice: str, compact: Mapping[ir.Value, Compact]
) -> tuple[ir.Value, ir.Value]:
    """Return the active pixels `[...]` and their activated values `[..., Cout]`."""
    operator = specification(node)
    inputs, attributes = operator.bind(node), operator.attributes_of(node)
    x, weight = inputs["X"], array_of(inputs["W"])
    assert x is not None and weight is not None
    place = Place.of(node, inputs["tiles"])
    active = place.active(build)
    source = compact.get(x)
    rows = source.rows if source else to_rows(build, x)
    step = WINOGRAD_STEPS.get(choice)
    residual, activation = inputs["residual"], attributes["activation"]
    layer = _Layer(weight, inputs["B"], "none" if residual is not None else activation)
    if step and winograd_applies(weight.shape[2:], attributes, place.size, place.grid, step):
        pixels, reads = _winograd_lists(build, place, active, step)
        y = _winograd(build, rows, _through(build, source, reads), layer, step, place.cells.shape[1] // step**2)
    else:
        pixels, reads = _window_lists(build, place, active, weight.shape[2:], attributes, plane_size(x))
        y = _product(build, rows, _through(build, source, reads), layer, place.cells.shape[1])
    if residual is not None:
        y = build.op("Add", y, build.op("Gather", to_rows(build, residual), pixels, axis=0))
        y = activate(build, y, activation)
    return pixels, y


@dataclass(frozen=True)
class _Layer:
    """What is applied to gathered pixels: weight `[Cout, Cin, kh, kw]`, bias, activation."""

    weight: np.ndarray
    bias: ir.Value | None
    activation: str

    def finish(self, build: Builder, y: ir.Value) -> ir.Value:
        """Add the bias and activate."""
        y = y if self.bias is None else build.op("Add", y, self.bias)
        return activate(build, y, self.activation)


def _through(build: Builder, source: Compact | None, reads: ir.Value) -> ir.Value:
    """Turn rows of a plane into rows of its compact form."""
    return reads if source is None else build.op("Gather", source.index, reads, axis=0)


def _window_lists(
    build: Builder,
    place: Place,
    active: ir.Value,
    kernel: tuple[int, ...],
    attributes: Mapping[str, Any],
    input_size: tuple[int, int],
) -> tuple[ir.Value, ir.Value]:
    """Return the active pixels `[1, n, k]` and the rows their windows read `[1, n, k, kh*kw]`."""
    table = windows(
        place.cells, input_size, place.frames, (kernel[0], kernel[1]),
        attributes["strides"], attributes["pads"], attributes["dilations"],
    )  # fmt: skip
    return place.pixels(build, active), build.op("Gather", build.const(table), active, axis=0)


def _product(build: Builder, rows: ir.Value, reads: ir.Value, layer: _Layer, pixels: int) -> ir.Value:
    """One product over windows: `[1, n, k, Cout]`.

    It is written on matrices, so that the runtime makes one operator of product, bias and activation.
    """
    cout, cin, height, width = layer.weight.shape
    shape = build.ints(-1, height * width * cin)
    patches = build.op("Reshape", build.op("Gather", rows, reads, axis=0), shape)
    matrix = build.const(layer.weight.transpose(2, 3, 1, 0).reshape(-1, cout))
    y = layer.finish(build, build.op("MatMul", patches, matrix))
    return build.op("Reshape", y, build.ints(1, -1, pixels, cout))


def _winograd_lists(build: Builder, place: Place, active: ir.Value, m: int) -> tuple[ir.Value, ir.Value]:
    """Return the active pixels `[m*m, 1, n, p]` and the rows their p patches read `[(m+2)^2, 1, n, p]`."""
    corners = winograd_tiles(place.size, place.grid, m)

    def listed(kernel: int, pad: int) -> ir.Value:
        table = windows(corners, place.size, place.frames, (kernel, kernel), pads=(pad, pad)).transpose(2, 0, 1)
        return build.op("Gather", build.const(table), active, axis=1)

    return listed(m, 0), listed(m + 2, 1)


def _winograd(build: Builder, rows: ir.Value, reads: ir.Value, layer: _Layer, m: int, patches: int) -> ir.Value:
    """F(m, 3): transform the patches, multiply at every point, transform back: `[m*m, 1, n, p, Cout]`."""
    points, (cout, cin) = (m + 2) ** 2, layer.weight.shape[:2]
    to_points, _, from_points = transforms(m)

    def transformed(matrix: np.ndarray, value: ir.Value, *shape: int) -> ir.Value:
        flat = build.op("Reshape", value, build.ints(points, -1))
        mixed = build.op("MatMul", build.const(matrix.astype(np.float32)), flat)
        return build.op("Reshape", mixed, build.ints(matrix.shape[0], *shape))

    mixed = transformed(to_points, build.op("Gather", rows, reads, axis=0), -1, cin)
    products = build.op("MatMul", mixed, build.const(winograd_weight(layer.weight, m)))
    return layer.finish(build, transformed(from_points, products, 1, -1, patches, cout))
