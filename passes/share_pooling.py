"""Take a policy's global means from the tile pooling that is computed anyway.

A gate pools its input to the tile grid for the mask, and averages the whole plane for the channel policy. Where
the cells are even, with P the pooled grid and S a tile mask on it,

    mean over the plane of x                 =  mean over the grid of P
    mean over the plane of x * upsample(S)   =  mean over the grid of P * S        (D-STEP section 3.1)

which reads a few cells instead of the plane, and needs no masked copy of it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from dvexport.dialect.facts import averages_planes
from dvexport.dialect.masks import tile_index
from dvexport.graph.graph import Builder, array_of, replace_node
from dvexport.graph.match import attributes_of, is_op, made_by

__all__ = ["SharePooling"]


class SharePooling(ir.passes.InPlacePass):
    """Rewrite plane means of values that are also pooled to an even grid. Requires: gate level."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every match; pooling may then have to move before its new readers."""
        modified = False
        for node in list(model.graph):
            if averages_planes(node):
                modified |= _rewrite(node)
        if modified:
            common.TopologicalSortPass()(model)
        return ir.passes.PassResult(model, modified)


def _rewrite(node: ir.Node) -> bool:
    value = node.inputs[0]
    assert value is not None
    build = Builder(metadata=node.metadata_props)
    pooled = _even_pool(value)
    if pooled is None:
        masked = _masked(value)
        if masked is None:
            return False
        x, tiles = masked
        pooled = _even_pool(x)
        if pooled is None or pooled.shape is None or tiles.shape is None or pooled.shape[2:] != tiles.shape[1:]:
            return False
        frames, _, *grid = pooled.shape
        plane = build.op("Unsqueeze", tiles, build.ints(1), shape=[frames, 1, *grid], dtype=tiles.dtype)
        pooled = build.op("Mul", pooled, plane, shape=list(pooled.shape), dtype=pooled.dtype)
    attributes = attributes_of(node)
    replace_node(node, build, [build.op("ReduceMean", pooled, node.inputs[1], **attributes)])
    return True


def _even_pool(x: ir.Value) -> ir.Value | None:
    """Return x pooled to a grid of even cells, if something computes it."""
    for node, _ in x.uses():
        if not is_op(node, "AveragePool") or x.shape is None:
            continue
        kernel = list(node.attributes["kernel_shape"].as_ints())
        strides = list(node.attributes["strides"].as_ints()) if "strides" in node.attributes else [1, 1]
        pads = node.attributes["pads"].as_ints() if "pads" in node.attributes else [0]
        even = all(isinstance(x.shape[2 + i], int) and x.shape[2 + i] % kernel[i] == 0 for i in range(2))  # type: ignore[operator]
        if kernel == strides and not any(pads) and even:
            return node.outputs[0]
    return None


def _masked(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Match x * Unsqueeze(upsample(tiles), 1); return x and the float tile mask `[N, gh, gw]`."""
    product = made_by(value, "Mul")
    if product is None or len(value.uses()) != 1:
        return None
    for index in range(2):
        x, mask = product.inputs[1 - index], product.inputs[index]
        assert x is not None and mask is not None
        tiles = _upsampled(mask)
        if tiles is not None:
            return x, tiles
    return None


def _upsampled(mask: ir.Value) -> ir.Value | None:
    """See through Unsqueeze and the two gathers of the nearest rule."""
    unsqueeze = made_by(mask, "Unsqueeze")
    if unsqueeze is None:
        return None
    value = unsqueeze.inputs[0]
    for _ in range(2):
        gather = made_by(value, "Gather")
        if gather is None or gather.inputs[0] is None:
            return None
        source, index = gather.inputs[0], array_of(gather.inputs[1])
        axis = gather.attributes.get_int("axis", 0)
        if index is None or source.shape is None or not isinstance(source.shape[axis], int):
            return None
        if not np.array_equal(index, tile_index(len(index), int(source.shape[axis]))):  # type: ignore[arg-type]
            return None
        value = source
    return value
