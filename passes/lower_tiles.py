"""Compute only the active tiles, as matrix products over gathered pixel rows.

In the pixel-row layout (`dvexport.dialect.rows`) a convolution over chosen pixels is

    Y[pixels] = act( Gather(X, windows[pixels]) W + B ),      W: [kh*kw*Cin, Cout] constant

so the gated work is one matrix product with a dynamic number of rows, and everything around it copies
contiguous rows. For even tiles of stride-1 3x3 convolutions the product can be Winograd's
(`dvexport.passes.winograd`), which gathers 2.25 (F(4,3)) or 4 (F(2,3)) instead of 9 rows a pixel and
multiplies 4 or 2.25 times less.

Between the two convolutions of a gate the merged activation stays compact: only its active pixels exist,
after a zero row at index 0, and the second convolution finds them through a map from pixel to
compact row. No plane is zeroed, copied or scattered for it.

The lowering of a node is read from its gate's choice (`dvexport.passes.choose_lowering`):
`tiles`, `winograd4` or `winograd2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from dvexport.dialect.conv import activate, plane_size
from dvexport.dialect.rows import rows_shape
from dvexport.dialect.spec import operator_of
from dvexport.errors import PassError
from dvexport.graph import DV, Builder, array_of, replace_node, static_shape
from dvexport.passes.choose_lowering import BY_TILE, lowering_of
from dvexport.passes.pixel_tables import tile_pixels, windows, winograd_tiles
from dvexport.passes.winograd import WINOGRAD_STEPS, transforms, winograd_applies, winograd_weight

__all__ = ["LowerTiles"]

_COMPACT_FROM = 1 << 16
"""Plane size, in values, from which copying it costs more than the lists that avoid it."""


class LowerTiles(ir.passes.InPlacePass):
    """Lower `SparseConv` and `Merge` nodes of gates whose choice computes active tiles only.

    Requires: static shapes, tiles given. Ensures: those nodes are standard ONNX over pixel rows.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower in graph order; equal tables and lists are shared afterwards."""
        compact: dict[ir.Value, _Compact] = {}
        overlays: dict[ir.Value, _Overlay] = {}
        modified = False
        for node in list(model.graph):
            choice = lowering_of(node)
            if choice not in BY_TILE or node.domain != DV:
                continue
            output = node.outputs[0]
            if node.op_type == "SparseConv" and _only_history(node):
                overlays[output] = _lower_history(node)
            elif node.op_type == "SparseConv":
                _lower_conv(node, choice, compact)
            elif node.op_type == "Merge" and _stays_compact(node):
                compact[output] = _lower_merge(node, overlays)
            elif node.op_type == "Merge":
                _lower_merge_to_plane(node)
            else:
                continue
            modified = True
        common.RemoveUnusedNodesPass()(model)  # merges and histories that stayed compact
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class _Compact:
    """A merged activation: `rows` `[1 + n, C]`, a zero row first; `index` maps a pixel to its row, or to 0."""

    rows: ir.Value
    index: ir.Value


@dataclass(frozen=True)
class _Overlay:
    """A history that was not scattered: `base` rows with `values` at `pixels`."""

    base: ir.Value
    pixels: ir.Value
    values: ir.Value


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

    @property
    def cells(self) -> np.ndarray:
        """Output pixels (y, x) of each cell."""
        return tile_pixels(self.size, self.grid)

    def active(self, build: Builder) -> ir.Value:
        """The active cells over all frames, `[1, n]` as NonZero lists them."""
        return build.op("NonZero", build.op("Reshape", self.tiles, build.ints(-1)))

    def pixels(self, build: Builder, active: ir.Value) -> ir.Value:
        """The pixels of the active cells as rows of the output plane, `[1, n, k, 1]`."""
        table = windows(self.cells, self.size, self.frames, (1, 1))
        return build.op("Gather", build.const(table), active, axis=0)


def to_rows(build: Builder, value: ir.Value) -> ir.Value:
    """View a plane as pixel rows."""
    return build.op("ToRows", value, domain=DV, shape=rows_shape(static_shape(value)), dtype=value.dtype)


def from_rows(build: Builder, rows: ir.Value, size: tuple[int, int]) -> ir.Value:
    """View pixel rows as a plane."""
    return build.op("FromRows", rows, domain=DV, size=list(size))


def _only_history(node: ir.Node) -> bool:
    """A SparseConv read as the history of one compact Merge, on tiles that are among the Merge's."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        return False
    (user, position) = uses[0]
    inputs = _inputs(node)
    return (
        user.op_type == "Merge"
        and user.domain == DV
        and position == 1
        and inputs["base"] is not None
        and inputs["rows"] is None
        and _stays_compact(user)
        and _implies(inputs["tiles"], _inputs(user)["tiles"])
    )


def _stays_compact(merge: ir.Node) -> bool:
    """The plane is worth saving, and every reader is a tile-lowered convolution over the same tiles."""
    tiles = _inputs(merge)["tiles"]
    small = prod(static_shape(merge.outputs[0])) < _COMPACT_FROM
    return (
        not small
        and not merge.outputs[0].is_graph_output()
        and all(
            user.op_type == "SparseConv"
            and user.domain == DV
            and position == 0
            and lowering_of(user) in BY_TILE
            and _inputs(user)["tiles"] is tiles
            for user, position in merge.outputs[0].uses()
        )
    )


def _implies(tiles: ir.Value | None, wanted: ir.Value | None) -> bool:
    """Tell whether a mask is `wanted`, or a conjunction with it."""
    if tiles is wanted:
        return True
    node = tiles.producer() if tiles is not None else None
    return node is not None and node.op_type == "And" and any(_implies(v, wanted) for v in node.inputs)


def _inputs(node: ir.Node) -> Mapping[str, ir.Value | None]:
    operator = operator_of(node)
    assert operator is not None
    return operator.bind(node)


def _lower_history(node: ir.Node) -> _Overlay:
    """Compute what is owed, and leave it to the Merge to lay it over the old plane.

    Few tiles are owed, so one plain product serves better than Winograd's three.
    """
    inputs = _inputs(node)
    build = Builder(metadata=node.metadata_props)
    pixels, y = _convolve(build, node, "tiles", {})
    base = inputs["base"]
    assert base is not None and node.graph is not None
    overlay = _Overlay(to_rows(build, base), pixels, y)
    node.graph.insert_before(node, build.nodes)
    return overlay


def _lower_conv(node: ir.Node, choice: str, compact: Mapping[ir.Value, _Compact]) -> None:
    inputs = _inputs(node)
    place = _Place.of(node, inputs["tiles"])
    build = Builder(metadata=node.metadata_props)
    pixels, y = _convolve(build, node, choice, compact)
    base = None if inputs["base"] is None else to_rows(build, inputs["base"])
    if inputs["rows"] is not None:
        y = _keep_rows(build, inputs["rows"], y, base, pixels, place)
    result = _scatter(build, base, pixels, y, place)
    replace_node(node, build, [from_rows(build, result, place.size)])


def _convolve(
    build: Builder, node: ir.Node, choice: str, compact: Mapping[ir.Value, _Compact]
) -> tuple[ir.Value, ir.Value]:
    """Return the active pixels `[..., 1]` and their activated values `[..., Cout]`."""
    operator = operator_of(node)
    assert operator is not None
    inputs, attributes = operator.bind(node), operator.attributes_of(node)
    x, weight = inputs["X"], array_of(inputs["W"])
    assert x is not None and weight is not None
    place = _Place.of(node, inputs["tiles"])
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
        y = build.op("Add", y, build.op("GatherND", to_rows(build, residual), pixels))
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


def _through(build: Builder, source: _Compact | None, reads: ir.Value) -> ir.Value:
    """Turn rows of a plane into rows of its compact form."""
    return reads if source is None else build.op("Gather", source.index, reads, axis=0)


def _window_lists(
    build: Builder,
    place: _Place,
    active: ir.Value,
    kernel: tuple[int, ...],
    attributes: Mapping[str, Any],
    input_size: tuple[int, int],
) -> tuple[ir.Value, ir.Value]:
    """Return the active pixels `[1, n, k, 1]` and the rows their windows read `[1, n, k, kh*kw]`."""
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


def _winograd_lists(build: Builder, place: _Place, active: ir.Value, m: int) -> tuple[ir.Value, ir.Value]:
    """Return the active pixels `[m*m, 1, n, p, 1]` and the rows their p patches read `[(m+2)^2, 1, n, p]`."""
    corners = winograd_tiles(place.size, place.grid, m)

    def listed(kernel: int, pad: int, *last: int) -> ir.Value:
        table = windows(corners, place.size, place.frames, (kernel, kernel), pads=(pad, pad)).transpose(2, 0, 1)
        return build.op("Gather", build.const(table.reshape(*table.shape, *last)), active, axis=1)

    return listed(m, 0, 1), listed(m + 2, 1)


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


def _lower_merge(node: ir.Node, overlays: Mapping[ir.Value, _Overlay]) -> _Compact:
    """Merge the active pixels only, after a zero row."""
    inputs = _inputs(node)
    place = _Place.of(node, inputs["tiles"])
    build = Builder(metadata=node.metadata_props)
    flat = build.op("Reshape", place.pixels(build, place.active(build)), build.ints(-1))
    zero = place.rows[0] - 1
    one = build.const(1, np.int64)
    listed = build.op("Concat", build.ints(zero), flat, axis=0)
    places = build.op("Range", one, build.op("Size", listed), one)
    index = build.op("ScatterElements", build.const(np.zeros(zero + 1, np.int64)), flat, places, axis=0)
    listed = build.op("Unsqueeze", listed, build.ints(-1))
    rows = _merged(build, inputs, place, listed, overlays, index)
    assert node.graph is not None
    node.graph.insert_before(node, build.nodes)
    return _Compact(rows, index)


def _lower_merge_to_plane(node: ir.Node) -> None:
    inputs = _inputs(node)
    place = _Place.of(node, inputs["tiles"])
    build = Builder(metadata=node.metadata_props)
    pixels = place.pixels(build, place.active(build))
    rows = _merged(build, inputs, place, pixels, {}, None)
    replace_node(node, build, [from_rows(build, _scatter(build, None, pixels, rows, place), place.size)])


def _merged(
    build: Builder,
    inputs: Mapping[str, ir.Value | None],
    place: _Place,
    pixels: ir.Value,
    overlays: Mapping[ir.Value, _Overlay],
    index: ir.Value | None,
) -> ir.Value:
    """The merge of D-STEP Eq. 1 at chosen pixels `[..., 1]`: `[..., C]`."""
    v, history, action = inputs["V"], inputs["H"], inputs["action"]
    assert v is not None
    u = build.op("GatherND", to_rows(build, v), pixels)
    if action is None:
        return u
    assert history is not None
    overlay = overlays.get(history)
    if overlay is not None:
        assert index is not None
        old = build.op("GatherND", overlay.base, pixels)
        where = build.op("Gather", index, overlay.pixels, axis=0)
        old = build.op("ScatterND", old, where, overlay.values)
    else:
        old = u if history is v else build.op("GatherND", to_rows(build, history), pixels)
    kept = build.op("Mul", u, _share(build, action, 2, pixels, place))
    return build.op("Add", kept, build.op("Mul", old, _share(build, action, 1, pixels, place)))


def _share(build: Builder, action: ir.Value, value: int, pixels: ir.Value, place: _Place) -> ir.Value:
    """1.0 in the channels of an action, 0.0 elsewhere: multiplying is far cheaper than selecting by row."""
    chosen = build.op("Equal", action, build.const(value, np.int64))
    return _by_pixel(build, build.op("Cast", chosen, to=ir.DataType.FLOAT), pixels, place)


def _keep_rows(
    build: Builder, rows: ir.Value, y: ir.Value, base: ir.Value | None, pixels: ir.Value, place: _Place
) -> ir.Value:
    """Keep only the channels asked for; the others stay as in `base`."""
    old = build.const(np.float32(0)) if base is None else build.op("GatherND", base, pixels)
    return build.op("Where", _by_pixel(build, rows, pixels, place), y, old)


def _by_pixel(build: Builder, mask: ir.Value, pixels: ir.Value, place: _Place) -> ir.Value:
    """Spread a channel mask `[N, C]` over pixels `[..., 1]` of its frames: `[..., C]`."""
    if place.frames == 1:
        return mask
    plane = build.const(place.size[0] * place.size[1], np.int64)
    frame = build.op("Div", pixels, plane)  # the zero row has a frame past the last: any will do
    last = build.const(place.frames - 1, np.int64)
    return build.op("GatherND", mask, build.op("Min", frame, last))


def _scatter(build: Builder, base: ir.Value | None, pixels: ir.Value, y: ir.Value, place: _Place) -> ir.Value:
    if base is None:
        base = build.const(np.zeros(place.rows, np.float32))
    return build.op("ScatterND", base, pixels, y, shape=place.rows, dtype=ir.DataType.FLOAT)
