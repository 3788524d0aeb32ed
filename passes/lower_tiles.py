"""Compute only the active tiles, as matrix products over gathered pixel rows.

In the pixel-row layout (`dvexport.dialect.rows`) a convolution over chosen pixels is

    Y[pixels] = act( Gather(X, windows[pixels]) W + B ),      W: [kh*kw*Cin, Cout] constant

so the gated work is one matrix product with a dynamic number of rows, and everything around it copies
contiguous rows. For even tiles of stride-1 3x3 convolutions the product can be Winograd's
(`dvexport.passes.winograd`), which gathers 2.25 (F(4,3)) or 4 (F(2,3)) instead of 9 rows a pixel and
multiplies 4 or 2.25 times less.

The lowering of a node is read from its gate's choice (`dvexport.passes.choose_lowering`):
`tiles`, `winograd4` or `winograd2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from dvexport.dialect.conv import activate, plane_size
from dvexport.dialect.rows import rows_shape
from dvexport.dialect.spec import operator_of
from dvexport.errors import PassError
from dvexport.graph import DV, Builder, array_of, replace_node, static_shape
from dvexport.passes.choose_lowering import BY_TILE, lowering_of
from dvexport.passes.pixel_tables import tile_pixels, windows, winograd_tiles
from dvexport.passes.winograd import WINOGRAD_STEPS, transforms, winograd_applies, winograd_weight

__all__ = ["LowerTiles"]


class LowerTiles(ir.passes.InPlacePass):
    """Lower `SparseConv` and `Merge` nodes of gates whose choice computes active tiles only.

    Requires: static shapes, tiles given. Ensures: those nodes are standard ONNX over pixel rows.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower each node on its own; equal tables and lists are shared afterwards."""
        modified = False
        for node in list(model.graph):
            choice = lowering_of(node)
            if choice not in BY_TILE or node.domain != DV:
                continue
            if node.op_type == "SparseConv":
                _lower_conv(node, choice)
            elif node.op_type == "Merge":
                _lower_merge(node)
            else:
                continue
            modified = True
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class _Place:
    """Where a node computes: its output plane and the tiles chosen on it."""

    frames: int
    channels: int
    size: tuple[int, int]
    grid: tuple[int, int]
    tiles: ir.Value

    @classmethod
    def of(cls, node: ir.Node, tiles: ir.Value | None) -> _Place:
        if tiles is None:
            raise PassError("a tile lowering needs a tile mask", where=node.name)
        frames, channels, *size = static_shape(node.outputs[0])
        grid = static_shape(tiles)[1:]
        return cls(frames, channels, (size[0], size[1]), (grid[0], grid[1]), tiles)

    @property
    def rows(self) -> tuple[int, int]:
        return rows_shape((self.frames, self.channels, *self.size))

    def active(self, build: Builder) -> ir.Value:
        """The list of active cells, over all frames."""
        flat = build.op("Reshape", self.tiles, build.ints(-1))
        return build.op("Squeeze", build.op("NonZero", flat), build.ints(0))


def to_rows(build: Builder, value: ir.Value) -> ir.Value:
    """View a plane as pixel rows."""
    return build.op("ToRows", value, domain=DV, shape=rows_shape(static_shape(value)), dtype=value.dtype)


def from_rows(build: Builder, rows: ir.Value, size: tuple[int, int]) -> ir.Value:
    """View pixel rows as a plane."""
    return build.op("FromRows", rows, domain=DV, size=list(size))


def _lower_conv(node: ir.Node, choice: str) -> None:
    operator = operator_of(node)
    assert operator is not None
    inputs, attributes = operator.bind(node), operator.attributes_of(node)
    place = _Place.of(node, inputs["tiles"])
    build = Builder(metadata=node.metadata_props)
    active = place.active(build)
    step = WINOGRAD_STEPS.get(choice)
    weight = inputs["W"]
    assert weight is not None
    if step and winograd_applies(plane_size(weight), attributes, place.size, place.grid, step):
        pixels, y = _winograd(build, inputs, place, active, step)
    else:
        pixels, y = _product(build, inputs, attributes, place, active)
    if inputs["B"] is not None:
        y = build.op("Add", y, inputs["B"])
    if inputs["residual"] is not None:
        y = build.op("Add", y, build.op("Gather", to_rows(build, inputs["residual"]), pixels, axis=0))
    y = activate(build, y, attributes["activation"])
    base = None if inputs["base"] is None else to_rows(build, inputs["base"])
    if inputs["rows"] is not None:
        y = _keep_rows(build, inputs["rows"], y, base, pixels, place)
    result = _scatter(build, base, pixels, y, place)
    replace_node(node, build, [from_rows(build, result, place.size)])


def _product(
    build: Builder, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any], place: _Place, active: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Return the active pixels `[n]` and their values `[n, Cout]` by one product over windows."""
    x, weight = inputs["X"], array_of(inputs["W"])
    assert x is not None and weight is not None
    kernel = weight.shape[2:]
    cells = tile_pixels(place.size, place.grid)
    reads = windows(
        cells, plane_size(x), place.frames, kernel,
        attributes["strides"], attributes["pads"], attributes["dilations"],
    )  # fmt: skip
    taps = kernel[0] * kernel[1]
    chosen = build.op("Reshape", build.op("Gather", build.const(reads), active, axis=0), build.ints(-1, taps))
    gathered = build.op("Gather", to_rows(build, x), chosen, axis=0)
    patches = build.op("Reshape", gathered, build.ints(-1, taps * weight.shape[1]))
    matrix = np.ascontiguousarray(weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0]))
    writes = windows(cells, place.size, place.frames, (1, 1))[..., 0]
    pixels = build.op("Reshape", build.op("Gather", build.const(writes), active, axis=0), build.ints(-1))
    return pixels, build.op("MatMul", patches, build.const(matrix))


def _winograd(
    build: Builder, inputs: Mapping[str, ir.Value | None], place: _Place, active: ir.Value, m: int
) -> tuple[ir.Value, ir.Value]:
    """Return the active pixels `[m*m, n]` and their values `[m*m, n, Cout]` by F(m, 3)."""
    x, weight = inputs["X"], array_of(inputs["W"])
    assert x is not None and weight is not None
    points, channels = (m + 2) ** 2, weight.shape[1]
    to_points, _, from_points = transforms(m)
    corners = winograd_tiles(place.size, place.grid, m)
    reads = windows(corners, plane_size(x), place.frames, (m + 2, m + 2), pads=(1, 1)).transpose(2, 0, 1)
    writes = windows(corners, place.size, place.frames, (m, m)).transpose(2, 0, 1)

    def listed(table: np.ndarray) -> ir.Value:
        chosen = build.op("Gather", build.const(np.ascontiguousarray(table)), active, axis=1)
        return build.op("Reshape", chosen, build.ints(table.shape[0], -1))

    def transformed(matrix: np.ndarray, value: ir.Value, width: int) -> ir.Value:
        flat = build.op("Reshape", value, build.ints(points, -1))
        mixed = build.op("MatMul", build.const(matrix.astype(np.float32)), flat)
        return build.op("Reshape", mixed, build.ints(matrix.shape[0], -1, width))

    gathered = build.op("Gather", to_rows(build, x), listed(reads), axis=0)
    mixed = transformed(to_points, gathered, channels)
    products = build.op("MatMul", mixed, build.const(winograd_weight(weight, m)))
    return listed(writes), transformed(from_points, products, weight.shape[0])


def _lower_merge(node: ir.Node) -> None:
    operator = operator_of(node)
    assert operator is not None
    inputs = operator.bind(node)
    place = _Place.of(node, inputs["tiles"])
    build = Builder(metadata=node.metadata_props)
    writes = windows(tile_pixels(place.size, place.grid), place.size, place.frames, (1, 1))[..., 0]
    chosen = build.op("Gather", build.const(writes), place.active(build), axis=0)
    pixels = build.op("Reshape", chosen, build.ints(-1))
    v, history, action = inputs["V"], inputs["H"], inputs["action"]
    assert v is not None
    u = build.op("Gather", to_rows(build, v), pixels, axis=0)
    if action is not None:
        assert history is not None
        zero = build.const(np.float32(0))
        keep = _by_pixel(build, build.op("Equal", action, build.const(2, np.int64)), pixels, place)
        reuse = _by_pixel(build, build.op("Equal", action, build.const(1, np.int64)), pixels, place)
        old = u if history is v else build.op("Gather", to_rows(build, history), pixels, axis=0)
        u = build.op("Where", keep, u, build.op("Where", reuse, old, zero))
    replace_node(node, build, [from_rows(build, _scatter(build, None, pixels, u, place), place.size)])


def _keep_rows(
    build: Builder, rows: ir.Value, y: ir.Value, base: ir.Value | None, pixels: ir.Value, place: _Place
) -> ir.Value:
    """Keep only the channels asked for; the others stay as in `base`."""
    old = build.const(np.float32(0)) if base is None else build.op("Gather", base, pixels, axis=0)
    return build.op("Where", _by_pixel(build, rows, pixels, place), y, old)


def _by_pixel(build: Builder, mask: ir.Value, pixels: ir.Value, place: _Place) -> ir.Value:
    """Spread a channel mask `[N, C]` over the pixels of its frames."""
    if place.frames == 1:
        return mask
    plane = build.const(place.size[0] * place.size[1], np.int64)
    return build.op("Gather", mask, build.op("Div", pixels, plane), axis=0)


def _scatter(
    build: Builder, base: ir.Value | None, pixels: ir.Value, y: ir.Value, place: _Place
) -> ir.Value:
    if base is None:
        base = build.const(np.zeros(place.rows, np.float32))
    index = build.op("Unsqueeze", pixels, build.ints(-1))
    return build.op("ScatterND", base, index, y, shape=place.rows, dtype=ir.DataType.FLOAT)
