"""Pooling, and the convolutions that make tile masks, on pixel rows.

A gate's decision reads its input pooled to the tile grid. On rows (`dvexport.dialect.rows`) that is a mean over
gathered pixels, and where a gate has just replaced some tiles of a plane, only their means are new:

    pool(ScatterND(base, pixels of tiles, values)) = ScatterND(pool(base), tiles, mean of values)

so a chain of gates over one grid pools once, and then what it computes. A mask's convolution has one output
channel, which the runtimes' convolutions pad to a vector's width. It is a product with all taps at once, whose
few results are then summed along the windows:

    y[p] = sum over taps k of (X W)[window(p, k), k] + b,      W: [Cin, kh*kw] constant
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dvexport.dialect.conv import plane_size
from dvexport.dialect.rows import rows_of, rows_shape
from dvexport.geometry import output_size
from dvexport.graph.graph import DV, Builder, array_of, static_shape
from dvexport.graph.match import attributes_of, is_op, made_by
from dvexport.passes.tiles.pixel_tables import tile_pixels, windows

__all__ = ["average_pool", "conv_to_one_channel", "rows_at_hand"]


def rows_at_hand(value: ir.Value) -> ir.Value | None:
    """Return the rows of a plane: what it was made of, or what another node needs anyway."""
    made_for = (node.outputs[0] for node, _ in value.uses() if is_op(node, "ToRows", domain=DV))
    return rows_of(value) or next(made_for, None)


def average_pool(build: Builder, node: ir.Node) -> ir.Value | None:
    """AveragePool without padding, as a plane of rows; None where it has options that this does not follow."""
    x = node.inputs[0]
    assert x is not None
    attributes = attributes_of(node)
    kernel = tuple(attributes["kernel_shape"])
    strides, pads = tuple(attributes.get("strides", (1, 1))), attributes.get("pads", (0, 0, 0, 0))
    if any(pads) or attributes.get("ceil_mode", 0) or any(d != 1 for d in attributes.get("dilations", (1, 1))):
        return None
    frames, channels, height, width = static_shape(x)
    plain = {"pads": (0,) * 4, "strides": strides, "dilations": (1, 1)}
    down, across = output_size((height, width), kernel, plain)
    cells = windows(tile_pixels((down, across), (1, 1)), (height, width), frames, kernel, strides).reshape(
        -1, np.prod(kernel)
    )
    nothing = np.full((1, cells.shape[1]), frames * height * width)  # the mean of zero rows is the new zero row
    rows = rows_at_hand(x)
    assert rows is not None
    pooled = _pooled(build, rows, np.concatenate([cells, nothing]), channels)
    pooled.shape, pooled.type = ir.Shape(rows_shape((frames, channels, down, across))), x.type
    return build.op("FromRows", pooled, domain=DV, size=[down, across])


def _pooled(build: Builder, rows: ir.Value, cells: np.ndarray, channels: int) -> ir.Value:
    """The mean of the rows that each of `cells` `[n, k]` lists, `[n, C]`."""
    update = _update_of(rows, cells, channels)
    if update is None:
        return build.op("ReduceMean", build.op("Gather", rows, build.const(cells), axis=0), build.ints(1), keepdims=0)
    index = build.op("Unsqueeze", update.active, build.ints(-1))
    return build.op("ScatterND", _pooled(build, update.base, cells, channels), index, update.means(build))


@dataclass(frozen=True)
class _Update:
    """Rows that are `base` but for the tiles `active` `[1, n]`, which are `values`.

    Values are `[1, n, pixels, C]`, or `[m*m, 1, n, patches, C]` where `squares`, m*m, is given.
    """

    base: ir.Value
    active: ir.Value
    values: ir.Value
    squares: int | None
    patches: int
    channels: int

    def means(self, build: Builder) -> ir.Value:
        """The mean of every active tile, `[1, n, C]`.

        Over the first axis it is a product: the runtime reduces that axis several times slower.
        """
        values = self.values
        if self.squares is not None:
            flat = build.op("Reshape", values, build.ints(self.squares, -1))
            mean = build.const(np.full((1, self.squares), 1 / self.squares, np.float32))
            shape = build.ints(1, -1, self.patches, self.channels)
            values = build.op("Reshape", build.op("MatMul", mean, flat), shape)
        return build.op("ReduceMean", values, build.ints(2), keepdims=0)


def _update_of(rows: ir.Value, cells: np.ndarray, channels: int) -> _Update | None:
    """Match the scatter of a tile lowering whose tiles are these cells, the last of which is the zero row."""
    scatter = made_by(rows, "ScatterND")
    unsqueeze = made_by(scatter.inputs[1], "Unsqueeze") if scatter else None
    lookup = made_by(unsqueeze.inputs[0], "Gather") if unsqueeze else None
    if scatter is None or lookup is None:
        return None
    base, values, active = scatter.inputs[0], scatter.inputs[2], lookup.inputs[1]
    table, axis = array_of(lookup.inputs[0]), lookup.attributes["axis"].as_int()
    assert base is not None and values is not None and active is not None
    if table is None or table.ndim != 2 + axis:  # [tiles, pixels], or Winograd's [place in a patch, tiles, patches]
        return None
    listed = np.moveaxis(table, axis, 0).reshape(table.shape[axis], -1)
    if listed.shape != cells[:-1].shape or not np.array_equal(np.sort(listed), np.sort(cells[:-1])):
        return None
    squares, patches = (table.shape[0], table.shape[2]) if axis else (None, 1)
    return _Update(base, active, values, squares, patches, channels)


def conv_to_one_channel(build: Builder, node: ir.Node) -> ir.Value | None:
    """A convolution with one output channel, as a plane; None for another one."""
    x, weight = node.inputs[0], array_of(node.inputs[1])
    explicit = "auto_pad" not in node.attributes or node.attributes["auto_pad"].as_string() == "NOTSET"
    if weight is None or x is None or weight.shape[:2] != (1, static_shape(x)[1]) or not explicit:
        return None
    taps, frames = int(np.prod(weight.shape[2:])), static_shape(x)[0]
    size = plane_size(node.outputs[0])
    given = {name: tuple(node.attributes[name].as_ints()) for name in ("strides", "pads", "dilations")
             if name in node.attributes}  # fmt: skip
    reads = windows(tile_pixels(size, (1, 1)), plane_size(x), frames, weight.shape[2:], **given)  # type: ignore[arg-type]
    by_tap = build.op("MatMul", rows_of(x), build.const(weight.reshape(-1, taps)))
    found = build.op("Gather", build.op("Reshape", by_tap, build.ints(-1)), build.const(reads * taps + np.arange(taps)))
    y = build.op("ReduceSum", found, build.ints(2), keepdims=0)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        y = build.op("Add", y, node.inputs[2])
    return build.op("Reshape", y, build.ints(frames, 1, *size))
