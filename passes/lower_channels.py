"""Compute only the chosen output channels, and read only the active input channels, by gathering weights.

    Y[:, rows] = act( conv(X[:, active_in], W[rows][:, active_in]) + B[rows] )

One frame a step. Weights that are not constant leave the runtime's fastest convolution, so this pays
only where few channels are left; `choose_lowering` knows from measurement. An empty choice takes the other branch
of an `If`, which costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from dvexport.dialect.conv import activate, dense_conv
from dvexport.dialect.masks import upsample
from dvexport.dialect.spec import specification
from dvexport.graph.graph import DV, Builder, branch, replace_node, static_shape
from dvexport.graph.match import made_by
from dvexport.passes.lowerings import convs_lowered_as

__all__ = ["LowerChannels", "any_true", "lower_convs", "unmerged"]


class LowerChannels(ir.passes.InPlacePass):
    """Lower the `SparseConv` nodes of gates whose choice is `channels`. Requires: one frame."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower each node on its own."""
        return ir.passes.PassResult(model, lower_convs(model, "channels", _compute))


Compute = Callable[[Builder, Mapping[str, ir.Value | None], Mapping[str, Any], ir.Node], ir.Value]
"""Writes what a `SparseConv` computes, from its inputs and attributes by name."""


def lower_convs(model: ir.Model, lowering: str, compute: Compute) -> bool:
    """Replace each `SparseConv` of gates with this lowering by what `compute` writes; return whether there was any."""
    nodes = convs_lowered_as(model, lowering)
    for node in nodes:
        operator = specification(node)
        inputs, build = operator.bind(node), Builder(metadata=node.metadata_props)
        y = compute(build, inputs, operator.attributes_of(node), node)
        replace_node(node, build, [_settle(build, y, inputs, node)])
    return bool(nodes)


def _compute(
    build: Builder, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any], node: ir.Node
) -> ir.Value:
    if inputs["rows"] is not None:
        return _chosen_rows(build, inputs, attributes, static_shape(node.outputs[0]))
    if inputs["active_in"] is not None:
        return _active_inputs(build, inputs, attributes, static_shape(node.outputs[0]))
    return _plain(build, inputs, attributes)


def _chosen_rows(
    build: Builder, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any], shape: tuple[int, ...]
) -> ir.Value:
    """Compute the chosen output channels into `base`."""
    rows = inputs["rows"]
    assert rows is not None
    inner = Builder(metadata=build.metadata)
    chosen = _indices(inner, rows)
    weight = inner.op("Gather", inputs["W"], chosen, axis=0)
    bias = None if inputs["B"] is None else inner.op("Gather", inputs["B"], chosen, axis=0)
    y = activate(inner, dense_conv(inner, inputs["X"], weight, bias, attributes), attributes["activation"])
    planes = inner.op("Reshape", y, inner.ints(-1, *shape[2:]))
    base = inputs["base"] or inner.const(np.zeros(shape, np.float32))
    flat = inner.op("Reshape", base, inner.ints(*shape[1:]))
    merged = inner.op("ScatterND", flat, inner.op("Unsqueeze", chosen, inner.ints(-1)), planes)
    done = inner.op("Reshape", merged, inner.ints(*shape))
    other = Builder()
    kept = inputs["base"] or other.const(np.zeros(shape, np.float32))
    return build.op(
        "If", any_true(build, rows), then_branch=branch(inner, done, "some"), else_branch=branch(other, kept, "none")
    )


def _active_inputs(
    build: Builder, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any], shape: tuple[int, ...]
) -> ir.Value:
    """Reduce over the active input channels only."""
    active, x = inputs["active_in"], inputs["X"]
    assert active is not None and x is not None
    inner = Builder(metadata=build.metadata)
    chosen = _indices(inner, active)
    read = inner.op("Gather", unmerged(x), chosen, axis=1)
    weight = inner.op("Gather", inputs["W"], chosen, axis=1)
    some = _finish(inner, dense_conv(inner, read, weight, inputs["B"], attributes), inputs, attributes)
    other = Builder()
    none = _finish(other, _bias_plane(other, inputs["B"], shape), inputs, attributes)
    return build.op(
        "If", any_true(build, active), then_branch=branch(inner, some, "some"), else_branch=branch(other, none, "none")
    )


def _bias_plane(build: Builder, bias: ir.Value | None, shape: tuple[int, ...]) -> ir.Value:
    """What a convolution gives when all of its input is zero."""
    if bias is None:
        return build.const(np.zeros(shape, np.float32))
    return build.op("Expand", build.op("Reshape", bias, build.ints(1, -1, 1, 1)), build.ints(*shape))


def _plain(build: Builder, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any]) -> ir.Value:
    y = dense_conv(build, inputs["X"], inputs["W"], inputs["B"], attributes)
    return _finish(build, y, inputs, attributes)


def _finish(
    build: Builder, y: ir.Value, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any]
) -> ir.Value:
    if inputs["residual"] is not None:
        y = build.op("Add", y, inputs["residual"])
    return activate(build, y, attributes["activation"])


def _settle(build: Builder, y: ir.Value, inputs: Mapping[str, ir.Value | None], node: ir.Node) -> ir.Value:
    """Keep `base` outside the active tiles."""
    tiles = inputs["tiles"]
    if tiles is None:
        return y
    size = static_shape(node.outputs[0])[2:]
    base = inputs["base"] or build.const(np.float32(0))
    return build.op("Where", upsample(build, tiles, (size[0], size[1])), y, base)


def unmerged(x: ir.Value) -> ir.Value:
    """See through a `Merge` that only zeroes channels: what reads active channels alone needs no zeros."""
    node = made_by(x, "Merge", domain=DV)
    if node is None:
        return x
    operator = specification(node)
    inputs = operator.bind(node)
    v = inputs["V"]
    return v if v is not None and inputs["H"] is v and inputs["tiles"] is None else x


def any_true(build: Builder, mask: ir.Value) -> ir.Value:
    """Return a scalar that is true where a channel mask `[1, C]` has any channel."""
    most = build.op("ReduceMax", build.op("Cast", mask, to=ir.DataType.INT32), keepdims=0)
    return build.op("Cast", most, to=ir.DataType.BOOL)


def _indices(build: Builder, mask: ir.Value) -> ir.Value:
    flat = build.op("Reshape", mask, build.ints(-1))
    return build.op("Squeeze", build.op("NonZero", flat), build.ints(0))
