"""Compute whole groups of channels under a conditional, constant weights inside.

A group is a range of channels; its convolution lies in a branch of an `If` that is taken when any of its
channels is chosen. Weights stay constant, so the runtime's fastest convolution serves; the price is a conditional
and a concatenation a group. `group_channels` orders channels so that groups are computed or left
out as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from dvexport.dialect.conv import activate, dense_conv
from dvexport.dialect.masks import channel_mask
from dvexport.graph.graph import Builder, array_of, branch, static_shape
from dvexport.passes.group_channels import input_groups, output_groups
from dvexport.passes.lower_channels import any_true, lower_convs

__all__ = ["LowerGroups"]


class LowerGroups(ir.passes.InPlacePass):
    """Lower the `SparseConv` nodes of gates whose choice is `groups`. Requires: one frame."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower each node on its own."""
        return ir.passes.PassResult(model, lower_convs(model, "groups", _compute))


def _compute(
    build: Builder, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any], node: ir.Node
) -> ir.Value:
    return (_input_groups if inputs["rows"] is None else _output_groups)(build, inputs, attributes, node)


def _output_groups(
    build: Builder, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any], node: ir.Node
) -> ir.Value:
    """Each group of output channels is computed or taken from `base`; then channel by channel."""
    shape = static_shape(node.outputs[0])
    rows, weight, bias = inputs["rows"], array_of(inputs["W"]), array_of(inputs["B"])
    assert rows is not None and weight is not None
    base = inputs["base"] or build.const(np.zeros(shape, np.float32))
    parts = []
    for first, last in output_groups(node, weight.shape[0]):
        taken, left = Builder(metadata=build.metadata), Builder()
        y = dense_conv(
            taken, inputs["X"], taken.const(weight[first:last]),
            None if bias is None else taken.const(bias[first:last]), attributes,
        )  # fmt: skip
        y = activate(taken, y, attributes["activation"])
        kept = left.op("Slice", base, left.ints(first), left.ints(last), left.ints(1))
        parts.append(_either(build, _range(build, rows, first, last), taken, y, left, kept))
    merged = build.op("Concat", *parts, axis=1) if len(parts) > 1 else parts[0]
    return build.op("Where", channel_mask(build, rows), merged, base)


def _input_groups(
    build: Builder, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any], node: ir.Node
) -> ir.Value:
    """The reduction over input channels, summed over the groups that are active."""
    shape = static_shape(node.outputs[0])
    x, weight, active = inputs["X"], array_of(inputs["W"]), inputs["active_in"]
    assert x is not None and weight is not None
    ranges = input_groups(node, weight.shape[1]) if active is not None else [(0, weight.shape[1])]
    total = inputs["residual"]
    for index, (first, last) in enumerate(ranges):
        taken, left = Builder(metadata=build.metadata), Builder()
        bias = inputs["B"] if index == 0 else None
        read = taken.op("Slice", x, taken.ints(first), taken.ints(last), taken.ints(1))
        y = dense_conv(taken, read, taken.const(weight[:, first:last]), bias, attributes)
        if active is None:
            build.nodes += taken.nodes
            part = y
        else:
            start = np.zeros(shape, np.float32)
            if bias is not None:
                start += array_of(bias).reshape(1, -1, 1, 1)  # type: ignore[union-attr]
            part = _either(build, _range(build, active, first, last), taken, y, left, left.const(start))
        total = part if total is None else build.op("Add", total, part)
    assert total is not None
    return activate(build, total, attributes["activation"])


def _range(build: Builder, mask: ir.Value, first: int, last: int) -> ir.Value:
    return any_true(build, build.op("Slice", mask, build.ints(first), build.ints(last), build.ints(1)))


def _either(
    build: Builder, condition: ir.Value, taken: Builder, yes: ir.Value, left: Builder, no: ir.Value
) -> ir.Value:
    return build.op("If", condition, then_branch=branch(taken, yes, "some"), else_branch=branch(left, no, "none"))
