"""Compute only the active tiles, as matrix products over gathered pixel rows.

In the pixel-row layout (`dvexport.dialect.rows`) gated work is one matrix product with a dynamic number of
rows (`dvexport.passes.tiles.tile_products`), and everything around it copies contiguous rows.

Between the two convolutions of a gate the merged activation stays compact: only its active pixels exist,
before a zero row, and the second convolution finds them through a map from pixel to compact row.
No plane is zeroed, copied or scattered for it. A merge takes V from the convolution that just computed it,
in the order in which it did, and not from the plane that a state keeps.

The lowering of a node is read from its gate's choice (`dvexport.passes.choose_lowering`):
`tiles`, `winograd4` or `winograd2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from dvexport.decisions import Action
from dvexport.dialect.masks import share_of
from dvexport.dialect.spec import specification
from dvexport.graph.graph import DV, Builder, replace_node, static_shape
from dvexport.graph.match import is_op, made_by
from dvexport.passes.lowerings import lowering_of, names
from dvexport.passes.tiles.tile_products import Compact, Place, convolve, from_rows, to_rows

__all__ = ["LowerTiles"]

_COMPACT_FROM = 1 << 16
"""Plane size, in values, from which copying it costs more than the lists that avoid it."""


class LowerTiles(ir.passes.InPlacePass):
    """Lower `SparseConv` and `Merge` nodes of gates whose choice computes active tiles only.

    Requires: static shapes, tiles given. Ensures: those nodes are standard ONNX over pixel rows.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower in graph order; equal tables and lists are shared afterwards."""
        known = _Known()
        modified = False
        for node in list(model.graph):
            choice = lowering_of(node)
            if choice not in names("tiles"):
                continue
            output = node.outputs[0]
            if is_op(node, "SparseConv", domain=DV) and _only_history(node):
                known.overlays[output] = _lower_history(node)
            elif is_op(node, "SparseConv", domain=DV):
                _lower_conv(node, choice, known)
            elif is_op(node, "Merge", domain=DV) and _stays_compact(node):
                known.compact[output] = _lower_merge(node, known)
            elif is_op(node, "Merge", domain=DV):
                _lower_merge_to_plane(node, known)
            else:
                continue
            modified = True
        common.RemoveUnusedNodesPass()(model)  # merges and histories that stayed compact
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class _Overlay:
    """A history that was not scattered: `base` rows with `values` at `pixels`."""

    base: ir.Value
    pixels: ir.Value
    values: ir.Value


@dataclass(frozen=True)
class _Computed:
    """What a convolution computed on the active tiles: `values` `[..., C]` at `pixels` `[...]`."""

    tiles: ir.Value
    pixels: ir.Value
    values: ir.Value


@dataclass(frozen=True)
class _Known:
    """What has been lowered so far, by the value it stands for."""

    compact: dict[ir.Value, Compact] = field(default_factory=dict)
    overlays: dict[ir.Value, _Overlay] = field(default_factory=dict)
    computed: dict[ir.Value, _Computed] = field(default_factory=dict)


def _only_history(node: ir.Node) -> bool:
    """A SparseConv read as the history of one compact Merge, on tiles that are among the Merge's."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        return False
    (user, position) = uses[0]
    inputs = _inputs(node)
    return (
        is_op(user, "Merge", domain=DV)
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
            is_op(user, "SparseConv", domain=DV)
            and position == 0
            and lowering_of(user) in names("tiles")
            and _inputs(user)["tiles"] is tiles
            for user, position in merge.outputs[0].uses()
        )
    )


def _implies(tiles: ir.Value | None, wanted: ir.Value | None) -> bool:
    """Tell whether a mask is `wanted`, or a conjunction with it."""
    if tiles is wanted:
        return True
    node = made_by(tiles, "And")
    return node is not None and any(_implies(v, wanted) for v in node.inputs)


def _inputs(node: ir.Node) -> Mapping[str, ir.Value | None]:
    operator = specification(node)
    return operator.bind(node)


def _lower_history(node: ir.Node) -> _Overlay:
    """Compute what is owed, and leave it to the Merge to lay it over the old plane.

    Few tiles are owed, so one plain product serves better than Winograd's three.
    """
    inputs = _inputs(node)
    build = Builder(metadata=node.metadata_props)
    pixels, y = convolve(build, node, "tiles", {})
    base = inputs["base"]
    assert base is not None and node.graph is not None
    overlay = _Overlay(to_rows(build, base), pixels, y)
    node.graph.insert_before(node, build.nodes)
    return overlay


def _lower_conv(node: ir.Node, choice: str, known: _Known) -> None:
    inputs = _inputs(node)
    place = Place.of(node, inputs["tiles"])
    build = Builder(metadata=node.metadata_props)
    pixels, y = convolve(build, node, choice, known.compact)
    base = None if inputs["base"] is None else to_rows(build, inputs["base"])
    if inputs["rows"] is not None:
        y = _keep_rows(build, inputs["rows"], y, base, pixels, place)
    plane = from_rows(build, _scatter(build, base, pixels, y, place), place.size)
    known.computed[plane] = _Computed(place.tiles, pixels, y)
    replace_node(node, build, [plane])


def _lower_merge(node: ir.Node, known: _Known) -> Compact:
    """Merge the active pixels only, before a zero row."""
    inputs = _inputs(node)
    place = Place.of(node, inputs["tiles"])
    build = Builder(metadata=node.metadata_props)
    pixels, u = _v_of(build, inputs["V"], place, known)
    flat = build.op("Reshape", pixels, build.ints(-1))
    last = build.const(np.full(place.rows[0], -1))
    zero, one = (build.const(number, np.int64) for number in (0, 1))
    index = build.op("ScatterElements", last, flat, build.op("Range", zero, build.op("Size", flat), one), axis=0)
    u = u and build.op("Reshape", u, build.ints(-1, place.channels))
    rows = _merged(build, inputs, place, flat, u, known.overlays, index)
    rows = build.op("Concat", rows, build.const(np.zeros((1, place.channels), np.float32)), axis=0)
    assert node.graph is not None
    node.graph.insert_before(node, build.nodes)
    return Compact(rows, index)


def _lower_merge_to_plane(node: ir.Node, known: _Known) -> None:
    inputs = _inputs(node)
    place = Place.of(node, inputs["tiles"])
    build = Builder(metadata=node.metadata_props)
    pixels, u = _v_of(build, inputs["V"], place, known)
    rows = _merged(build, inputs, place, pixels, u, {}, None)
    replace_node(node, build, [from_rows(build, _scatter(build, None, pixels, rows, place), place.size)])


def _v_of(build: Builder, v: ir.Value | None, place: Place, known: _Known) -> tuple[ir.Value, ir.Value | None]:
    """Return the active pixels, and V there if it was computed on these very tiles."""
    computed = known.computed.get(v) if v is not None else None
    if computed is not None and computed.tiles is place.tiles:
        return computed.pixels, computed.values
    return place.pixels(build, place.active(build)), None


def _merged(
    build: Builder,
    inputs: Mapping[str, ir.Value | None],
    place: Place,
    pixels: ir.Value,
    u: ir.Value | None,
    overlays: Mapping[ir.Value, _Overlay],
    index: ir.Value | None,
) -> ir.Value:
    """The merge of D-STEP Eq. 1 at chosen pixels `[...]`: `[..., C]`; `u` is V there, if it is at hand."""
    v, history, action = inputs["V"], inputs["H"], inputs["action"]
    assert v is not None
    u = u or build.op("Gather", to_rows(build, v), pixels, axis=0)
    if action is None:
        return u
    assert history is not None
    overlay = overlays.get(history)
    if overlay is not None:
        assert index is not None
        old = build.op("Gather", overlay.base, pixels, axis=0)
        where = build.op("Unsqueeze", build.op("Gather", index, overlay.pixels, axis=0), build.ints(-1))
        old = build.op("ScatterND", old, where, overlay.values)
    else:
        old = u if history is v else build.op("Gather", to_rows(build, history), pixels, axis=0)
    keep, reuse = (
        _by_pixel(build, share_of(build, action, value), pixels, place) for value in (Action.COMPUTE, Action.REUSE)
    )
    return build.op("Add", build.op("Mul", u, keep), build.op("Mul", old, reuse))


def _keep_rows(
    build: Builder, rows: ir.Value, y: ir.Value, base: ir.Value | None, pixels: ir.Value, place: Place
) -> ir.Value:
    """Keep only the channels asked for; the others stay as in `base`."""
    old = build.const(np.float32(0)) if base is None else build.op("Gather", base, pixels, axis=0)
    return build.op("Where", _by_pixel(build, rows, pixels, place), y, old)


def _by_pixel(build: Builder, mask: ir.Value, pixels: ir.Value, place: Place) -> ir.Value:
    """Spread a channel mask `[N, C]` over pixels `[...]` of its frames: `[..., C]`."""
    if place.frames == 1:
        return mask
    plane = build.const(place.size[0] * place.size[1], np.int64)
    frame = build.op("Div", pixels, plane)  # the zero row has a frame past the last: any will do
    last = build.const(place.frames - 1, np.int64)
    return build.op("Gather", mask, build.op("Min", frame, last), axis=0)


def _scatter(build: Builder, base: ir.Value | None, pixels: ir.Value, y: ir.Value, place: Place) -> ir.Value:
    if base is None:
        base = build.const(np.zeros(place.rows, np.float32))
    index = build.op("Unsqueeze", pixels, build.ints(-1))
    return build.op("ScatterND", base, index, y, shape=place.rows, dtype=ir.DataType.FLOAT)
