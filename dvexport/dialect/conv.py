"""What the convolutions of the dialect share: attributes, geometry, legality, dense value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from dvexport.geometry import output_size
from dvexport.graph.graph import Builder, array_of
from dvexport.names import ACTIVATIONS

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
"""`pads` is ONNX's (top, left, bottom, right); `activation` one of `dvexport.activations.ACTIVATIONS`."""


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
    """Return what is illegal about a dialect convolution: its attributes, then its constants, then its shapes."""
    found = []
    if attributes["activation"] not in ACTIVATIONS:
        found.append(f"has activation '{attributes['activation']}', not one of {', '.join(ACTIVATIONS)}")
    if attributes["group"] != 1:
        found.append("is grouped; gates are defined on ungrouped convolutions")
    for name, (count, least) in _GEOMETRY.items():
        given = attributes[name]
        if not isinstance(given, (tuple, list)) or len(given) != count or min(given) < least:
            found.append(f"has {name} {given}, which must be {count} numbers of at least {least}")
    weight = inputs["W"]
    if weight is not None and array_of(weight) is None:
        found.append("has a weight that is not constant")
    bias = inputs.get("B")
    if bias is not None and array_of(bias) is None:
        found.append("has a bias that is not constant")
    tiles = inputs.get("tiles")
    if tiles is not None and (tiles.shape is None or not all(isinstance(size, int) for size in tiles.shape[1:])):
        found.append("has a tile mask whose grid is not static")
    return found or _input_problems(inputs, attributes)


_GEOMETRY = {"strides": (2, 1), "pads": (4, 0), "dilations": (2, 1)}
"""How many numbers an attribute has, and the least each may be."""

_TYPES = {
    "X": ir.DataType.FLOAT, "W": ir.DataType.FLOAT, "B": ir.DataType.FLOAT, "action": ir.DataType.INT64,
    "tiles": ir.DataType.BOOL, "rows": ir.DataType.BOOL, "active_in": ir.DataType.BOOL,
    "residual": ir.DataType.FLOAT, "base": ir.DataType.FLOAT, "init_history": ir.DataType.FLOAT,
}  # fmt: skip


def _input_problems(inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any]) -> list[str]:
    """Compare types and sizes, so far as they are known, with those that X and W ask for."""
    given = {name: value for name, value in inputs.items() if value is not None}
    found = [
        f"has {name} of type {value.dtype.name}, not {_TYPES[name].name}"
        for name, value in given.items()
        if value.dtype is not None and value.dtype != _TYPES[name]
    ]
    x, weight = given.get("X"), given.get("W")
    if x is None or weight is None or x.shape is None or weight.shape is None:
        return found
    if len(x.shape) != 4 or len(weight.shape) != 4 or x.shape[1] != weight.shape[1]:
        return [*found, f"has X {x.shape} and W {weight.shape}, not [N, Cin, H, W] and [Cout, Cin, kh, kw]"]
    if not all(isinstance(size, int) for size in x.shape[2:]):
        return [*found, f"has a plane that is not static: {x.shape}"]
    frames, cin, cout = x.shape[0], x.shape[1], weight.shape[0]
    out = conv_shape(x, weight, attributes)
    if min(plane for plane in out[2:] if isinstance(plane, int)) < 1:
        found.append(f"has a window that does not fit a plane of {list(x.shape[2:])}")
    expected = {
        "B": (cout,), "action": (frames, cout), "rows": (frames, cout), "active_in": (frames, cin),
        "tiles": (frames, None, None), "residual": tuple(out), "base": tuple(out), "init_history": (1, *out[1:]),
    }  # fmt: skip
    for name, sizes in expected.items():
        shape = given[name].shape if name in given else None
        if shape is not None and not _fits(shape, sizes):
            wanted = ", ".join("any" if size is None else str(size) for size in sizes)
            found.append(f"has {name} of shape {shape}, not [{wanted}]")
    return found


def _fits(shape: ir.Shape, sizes: Sequence[Any]) -> bool:
    """Compare the sizes that are known on both sides."""
    pairs = list(zip(shape, sizes, strict=False))
    return len(shape) == len(sizes) and all(
        known == wanted for known, wanted in pairs if isinstance(known, int) and isinstance(wanted, int)
    )
