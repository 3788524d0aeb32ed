"""`dv.SparseConv`: recompute a part of a plane, keep the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from dvexport.dialect.conv import (
    CONV_ATTRIBUTES,
    activate,
    conv_problems,
    conv_shape,
    dense_conv,
    infer_conv,
    plane_size,
)
from dvexport.dialect.masks import channel_mask, upsample
from dvexport.dialect.spec import Operator
from dvexport.graph.graph import Builder

__all__ = ["SparseConv"]


class SparseConv(Operator):
    """`base` with the part (rows x tiles) replaced by `act(conv(X) + residual)`.

    X: `[N, Cin, H, W]`; W: `[Cout, Cin, kh, kw]`, constant; B: `[Cout]`; rows: bool `[N, Cout]`,
    the output channels to compute (all when left out); tiles: bool `[N, gh, gw]`, the cells to
    compute (all when left out); active_in: bool `[N, Cin]`, a promise that the other input
    channels are exactly zero; residual: `[N, Cout, H', W']`, added before the activation;
    base: `[N, Cout, H', W']` (zeros when left out).
    """

    name = "SparseConv"
    inputs = ("X", "W", "B?", "rows?", "tiles?", "active_in?", "residual?", "base?")
    outputs = ("Y",)
    attributes = CONV_ATTRIBUTES

    def infer(self, node: ir.Node) -> None:
        """Y is `[N, Cout, H', W']`."""
        infer_conv(node, self.attributes_of(node))

    def reference(
        self, build: Builder, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any]
    ) -> Sequence[ir.Value]:
        """Compute everything, then select."""
        y = dense_conv(build, inputs["X"], inputs["W"], inputs["B"], attributes)
        if inputs["residual"] is not None:
            y = build.op("Add", y, inputs["residual"])
        y = activate(build, y, attributes["activation"])
        base = inputs["base"] or build.const(np.float32(0))
        if inputs["rows"] is not None:
            y = build.op("Where", channel_mask(build, inputs["rows"]), y, base)
        if inputs["tiles"] is not None:
            y.shape, y.type = conv_shape(inputs["X"], inputs["W"], attributes), ir.TensorType(ir.DataType.FLOAT)
            y = build.op("Where", upsample(build, inputs["tiles"], plane_size(y)), y, base)
        return [y]

    def problems(self, node: ir.Node) -> list[str]:
        """The rules of every convolution of the dialect."""
        return super().problems(node) + conv_problems(self.bind(node), self.attributes_of(node))
