"""`dv.ToRows` and `dv.FromRows`: between planes and pixel rows.

Pixel rows hold a plane `[N, C, H, W]` as `[N*H*W + 1, C]`. A pixel's channels are contiguous, so gathering or
scattering pixels copies whole rows. The last row is zero, and index tables name that row wherever a window leaves the
plane.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from dvexport.dialect.spec import Operator
from dvexport.graph.graph import DV, Builder, static_shape
from dvexport.graph.match import made_by

__all__ = ["FromRows", "ToRows", "rows_of", "rows_shape", "zero_row"]


def rows_shape(plane: Sequence[int]) -> tuple[int, int]:
    """Return the shape of the pixel rows of an `[N, C, H, W]` plane."""
    frames, channels, height, width = plane
    return frames * height * width + 1, channels


def rows_of(value: ir.Value) -> ir.Value | None:
    """Return the rows of a plane, if a `FromRows` made it."""
    node = made_by(value, "FromRows", domain=DV)
    return None if node is None else node.inputs[0]


def zero_row(build: Builder, rows: ir.Value, channels: int) -> ir.Value:
    """Append the zero row to `[N*H*W, C]`."""
    return build.op("Concat", rows, build.const(np.zeros((1, channels), np.float32)), axis=0)


class ToRows(Operator):
    """`R = rows of X`; X: `[N, C, H, W]`, static; R: `[N*H*W + 1, C]`."""

    name = "ToRows"
    inputs = ("X",)
    outputs = ("R",)

    def infer(self, node: ir.Node) -> None:
        """R is `[N*H*W + 1, C]`."""
        (x,) = node.inputs
        assert x is not None
        node.outputs[0].shape = ir.Shape(rows_shape(static_shape(x)))
        node.outputs[0].type = x.type

    def reference(
        self, build: Builder, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any]
    ) -> Sequence[ir.Value]:
        """Transpose, flatten, append the zero row."""
        x = inputs["X"]
        assert x is not None
        channels = static_shape(x)[1]
        flat = build.op("Reshape", build.op("Transpose", x, perm=[0, 2, 3, 1]), build.ints(-1, channels))
        return [zero_row(build, flat, channels)]


class FromRows(Operator):
    """`X = plane of R`; `size` is the plane's (height, width)."""

    name = "FromRows"
    inputs = ("R",)
    outputs = ("X",)
    attributes: ClassVar[Mapping[str, Any]] = {"size": None}

    def infer(self, node: ir.Node) -> None:
        """X is `[N, C, H, W]`."""
        (rows,) = node.inputs
        assert rows is not None
        height, width = node.attributes["size"].as_ints()
        count, channels = static_shape(rows)
        node.outputs[0].shape = ir.Shape([(count - 1) // (height * width), channels, height, width])
        node.outputs[0].type = rows.type

    def reference(
        self, build: Builder, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any]
    ) -> Sequence[ir.Value]:
        """Drop the zero row, unflatten, transpose."""
        rows = inputs["R"]
        assert rows is not None
        count, channels = static_shape(rows)
        height, width = attributes["size"]
        frames = (count - 1) // prod((height, width))
        real = build.op("Slice", rows, build.ints(0), build.ints(count - 1), build.ints(0))
        shaped = build.op("Reshape", real, build.ints(frames, height, width, channels))
        return [build.op("Transpose", shaped, perm=[0, 3, 1, 2])]
