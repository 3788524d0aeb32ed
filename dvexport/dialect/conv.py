"""What the convolutions of the dialect share: attributes, geometry, legality, dense value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from dvexport.actions import ACTIVATIONS
from dvexport.geometry import output_size
from dvexport.graph import Builder, array_of

__all__ = [
    "CONV_ATTRIBUTES",
    "activate",
    "conv_problems",
    "conv_shape",
    "dense_conv",
    "infer_conv",
    "plane_size",
]

CONV_ATTRIBUTES: Mapping[str, Any] = {
    "strides": (1, 1),
    "pads": (0, 0, 0, 0),
    "dilations": (1, 1),
    "group": 1,
    "activation": "none",
    "gate": None,
}
"""`pads` is ONNX's (top, left, bottom, right); `activation` one of `dvexport.actions.ACTIVATIONS`."""


def plane_size(value: ir.Value) -> tuple[int, int]:
    """Return the static (height, width) of an `[N, C, H, W]` value."""
    assert value.shape is not None
    return int(value.shape[2]), int(value.shape[3])  # type: ignore[arg-type]


def conv_shape(x: ir.Value | None, weight: ir.Value | None, attributes: Mapping[str, Any]) -> ir.Shape:
    """Return the output's shape `[N, Cout, H', W']`."""
    assert x is not None and weight is not None and x.shape is not None and weight.shape is not None
    size = output_size(plane_size(x), plane_size(weight), attributes)
    return ir.Shape([x.shape[0], weight.shape[0], *size])


def infer_conv(node: ir.Node, attributes: Mapping[str, Any]) -> None:
    """Set the shape and type of a dialect convolution's first output."""
    x = node.inputs[0]
    assert x is not None
    node.outputs[0].shape = conv_shape(x, node.inputs[1], attributes)
    node.outputs[0].type = x.type


def activate(build: Builder, value: ir.Value, activation: str) -> ir.Value:
    """Apply the activation named."""
    return build.op("Relu", value) if activation == "relu" else value


def dense_conv(
    build: Builder,
    x: ir.Value | None,
    weight: ir.Value | None,
    bias: ir.Value | None,
    attributes: Mapping[str, Any],
) -> ir.Value:
    """Write the plain convolution, without its activation."""
    names = ("strides", "pads", "dilations", "group")
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return build.op("Conv", *inputs, **{name: attributes[name] for name in names})


def conv_problems(inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any]) -> list[str]:
    """Return what is illegal about a dialect convolution."""
    found = []
    if attributes["activation"] not in ACTIVATIONS:
        found.append(f"has activation '{attributes['activation']}', not one of {', '.join(ACTIVATIONS)}")
    if attributes["group"] != 1:
        found.append("is grouped; gates are defined on ungrouped convolutions")
    weight = inputs["W"]
    if weight is not None and array_of(weight) is None:
        found.append("has a weight that is not constant")
    bias = inputs.get("B")
    if bias is not None and array_of(bias) is None:
        found.append("has a bias that is not constant")
    tiles = inputs.get("tiles")
    if tiles is not None and (tiles.shape is None or not isinstance(tiles.shape[1], int)):
        found.append("has a tile mask whose grid is not static")
    return found
