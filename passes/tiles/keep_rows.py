"""Keep values in pixel rows from one tile-lowered convolution to the next.

Tile lowerings read and write pixel rows (`dvexport.dialect.rows`) between `ToRows` and `FromRows`. This pass
carries rows forward through whatever works on them as well (activations, sums, pointwise
convolutions, pooling, states), so that a network changes layout once, after its stem:

    ToRows(FromRows(r))            = r
    Relu(FromRows(r))              = FromRows(Relu(r))                  and the like
    pooling                        = mean over Gather(r, cells)         and the like (`dvexport.passes.tiles.pool_rows`)
    mean over the plane            = a constant row times r
    1x1 convolution                = Gather(r, strided pixels) W + B

Anything else reads the plane through `FromRows`, which stays correct and costs a transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from dvexport.dialect.conv import plane_size
from dvexport.dialect.facts import averages_planes
from dvexport.dialect.rows import rows_of, rows_shape, zero_row
from dvexport.graph.graph import DV, Builder, array_of, replace_node, static_shape
from dvexport.graph.match import is_op
from dvexport.graph.state import add_state, remove_state, state_input, states_of
from dvexport.passes.tiles.pixel_tables import tile_pixels, windows
from dvexport.passes.tiles.pool_rows import average_pool, conv_to_one_channel, rows_at_hand

__all__ = ["KeepRows"]


class KeepRows(ir.passes.InPlacePass):
    """Replace plane operators by their pixel-row form wherever their input is at hand as rows."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """One sweep over the nodes, then the states."""
        before = _layout_changes(model)
        for node in list(model.graph):
            rule = _RULES.get((node.domain, node.op_type))
            at_hand = rows_at_hand if rule is average_pool else rows_of
            if rule is None or not any(v is not None and at_hand(v) for v in node.inputs):
                continue
            build = Builder(metadata=node.metadata_props)
            result = rule(build, node)
            if result is not None:
                replace_node(node, build, [result])
        for state in states_of(model):
            _keep_state(model, state.name)
        common.TopologicalSortPass()(model)  # pooling may read rows that were made later, for a convolution
        return ir.passes.PassResult(model, _layout_changes(model) != before)


def _layout_changes(model: ir.Model) -> int:
    return sum(is_op(node, "ToRows", "FromRows", domain=DV) for node in model.graph)


def _as_rows(build: Builder, value: ir.Value) -> ir.Value:
    return rows_of(value) or build.op(
        "ToRows", value, domain=DV, shape=rows_shape(static_shape(value)), dtype=value.dtype
    )


def _plane(build: Builder, rows: ir.Value, node: ir.Node) -> ir.Value:
    """Wrap the rows of a node's output."""
    shape = static_shape(node.outputs[0])
    rows.shape, rows.type = ir.Shape(rows_shape(shape)), node.outputs[0].type
    return build.op("FromRows", rows, domain=DV, size=list(shape[2:]))


def _cancel(build: Builder, node: ir.Node) -> ir.Value | None:
    assert node.inputs[0] is not None
    return rows_of(node.inputs[0])


def _elementwise(build: Builder, node: ir.Node) -> ir.Value | None:
    """Relu keeps the zero row zero, and so does the sum of two planes of one shape."""
    values = [v for v in node.inputs if v is not None]
    if any(v.shape != node.outputs[0].shape for v in values):
        return None
    return _plane(build, build.op(node.op_type, *[_as_rows(build, v) for v in values]), node)


def _conv(build: Builder, node: ir.Node) -> ir.Value | None:
    return _pointwise(build, node) or conv_to_one_channel(build, node)


def _pointwise(build: Builder, node: ir.Node) -> ir.Value | None:
    """A 1x1 convolution without padding, any stride."""
    x, weight = node.inputs[0], array_of(node.inputs[1])
    plain = node.attributes.get_int("group", 1) == 1 and not any(node.attributes.get_ints("pads", (0,)))
    if weight is None or weight.shape[2:] != (1, 1) or not plain:
        return None
    assert x is not None
    frames, channels, height, width = static_shape(node.outputs[0])
    strides = node.attributes.get_ints("strides", (1, 1))
    pixels = tile_pixels((height, width), (1, 1))
    reads = windows(pixels, plane_size(x), frames, (1, 1), (strides[0], strides[1])).reshape(-1)
    y = build.op("Gather", rows_of(x), build.const(reads), axis=0)
    y = build.op("MatMul", y, build.const(np.ascontiguousarray(weight[:, :, 0, 0].T)))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        y = build.op("Add", y, node.inputs[2])
    return _plane(build, zero_row(build, y, channels), node)


def _plane_mean(build: Builder, node: ir.Node) -> ir.Value | None:
    """ReduceMean over height and width."""
    if not averages_planes(node):
        return None
    keep = node.attributes.get_int("keepdims", 1) == 1
    return _mean(build, node, [1, 1] if keep else [])


def _global_pool(build: Builder, node: ir.Node) -> ir.Value | None:
    return _mean(build, node, [1, 1])


def _mean(build: Builder, node: ir.Node, tail: list[int]) -> ir.Value:
    """Mean over each frame's pixels, `[frames, C, *tail]`, as a product with a constant row."""
    x = node.inputs[0]
    assert x is not None
    rows = rows_of(x)
    frames, channels, height, width = static_shape(x)
    pixels = height * width
    if frames == 1:  # the zero row is given weight zero, which saves a copy
        weights = np.full((1, pixels + 1), 1 / pixels, np.float32)
        weights[0, -1] = 0
        mean = build.op("MatMul", build.const(weights), rows)
        if not tail:
            return mean
    else:
        real = build.op("Slice", rows, build.ints(0), build.ints(frames * pixels), build.ints(0))
        planes = build.op("Reshape", real, build.ints(frames, pixels, channels))
        mean = build.op("MatMul", build.const(np.full((1, pixels), 1 / pixels, np.float32)), planes)
    return build.op("Reshape", mean, build.ints(frames, channels, *tail))


def _delay(build: Builder, node: ir.Node) -> ir.Value | None:
    """A clip's Delay of a plane: rows shift by a frame, the first frame reads the zero row."""
    x, init = node.inputs
    assert x is not None
    start = array_of(init)
    if start is None or np.any(start) or x.shape is None or len(x.shape) != 4:
        return None
    frames, _, height, width = static_shape(x)
    plane, total = height * width, frames * height * width
    index = np.concatenate([np.full(plane, total), np.arange(total - plane), [total]])
    return _plane(build, build.op("Gather", rows_of(x), build.const(index), axis=0), node)


_RULES: dict[tuple[str, str], Callable[[Builder, ir.Node], ir.Value | None]] = {
    (DV, "ToRows"): _cancel,
    (DV, "Delay"): _delay,
    ("", "Relu"): _elementwise,
    ("", "Add"): _elementwise,
    ("", "Conv"): _conv,
    ("", "ReduceMean"): _plane_mean,
    ("", "GlobalAveragePool"): _global_pool,
    ("", "AveragePool"): average_pool,
}


def _keep_state(model: ir.Model, name: str) -> None:
    """Store a state as rows if everything that reads it wants rows."""
    (state,) = (s for s in states_of(model) if s.name == name)
    read = next(v for v in model.graph.inputs if v.name == state.input)
    users: Sequence[ir.Node] = read.consumers()
    if len(state.shape) != 4 or not users or not all(is_op(user, "ToRows", domain=DV) for user in users):
        return
    read, write = remove_state(model, name)
    rows = state_input(model, name, users[0].outputs[0])
    for user in users:
        replace_node(user, Builder(), [rows])
    source = rows_of(write)
    if source is None:
        build = Builder()
        source = _as_rows(build, write)
        model.graph.extend(build.nodes)
    add_state(model, name, rows, source)
