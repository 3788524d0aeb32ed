"""`dv.GatedConv`: a convolution whose output channels and tiles are gated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from dvexport.dialect.conv import CONV_ATTRIBUTES, activate, conv_problems, conv_shape, dense_conv, infer_conv
from dvexport.dialect.merge import merge
from dvexport.dialect.spec import Operator
from dvexport.graph.graph import Builder

__all__ = ["GatedConv"]


class GatedConv(Operator):
    """`U = S * ([a=2] V + [a=1] H)` with `V[n] = act(conv(X[n]))`, `H[n] = V[n-1]`.

    X: `[N, Cin, H, W]`; W: `[Cout, Cin, kh, kw]`, constant; B: `[Cout]`; action: int64
    `[N, Cout]` of 0 skip, 1 reuse, 2 compute (AdaFuse section 3; D-STEP Eq. 1); tiles: bool
    `[N, gh, gw]`, S after upsampling by the nearest rule; active_in: bool `[N, Cin]`, a promise
    that the other input channels are exactly zero; init_history: `[1, Cout, H', W']`, H of the
    first frame (zeros when left out). Outputs: U `[N, Cout, H', W']` and, when asked for,
    last_history, V of the last frame. V is dense: only the current S applies to it.
    """

    name = "GatedConv"
    inputs = ("X", "W", "B?", "action?", "tiles?", "active_in?", "init_history?")
    outputs = ("U", "last_history?")
    attributes = CONV_ATTRIBUTES

    def infer(self, node: ir.Node) -> None:
        """U is `[N, Cout, H', W']`."""
        infer_conv(node, self.attributes_of(node))

    def reference(
        self, build: Builder, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any]
    ) -> Sequence[ir.Value]:
        """Dense convolution, then the merge, then the mask."""
        v = dense_conv(build, inputs["X"], inputs["W"], inputs["B"], attributes)
        v = activate(build, v, attributes["activation"])
        v.shape, v.type = conv_shape(inputs["X"], inputs["W"], attributes), ir.TensorType(ir.DataType.FLOAT)
        history, last = None, v
        if inputs["action"] is not None:
            history = inputs["init_history"] or build.const(np.zeros((1, *v.shape[1:]), np.float32))
        if v.shape[0] != 1:
            last = build.op("Slice", v, build.ints(-1), build.ints(2**31), build.ints(0))
            if history is not None:
                joined = build.op("Concat", history, v, axis=0)
                history = build.op("Slice", joined, build.ints(0), build.ints(-1), build.ints(0))
        u = merge(build, v, history, inputs["action"], inputs["tiles"])
        return [u if u is not v else build.op("Identity", v), last]

    def problems(self, node: ir.Node) -> list[str]:
        """History needs an action; the weight must be constant."""
        inputs = self.bind(node)
        found = super().problems(node) + conv_problems(inputs, self.attributes_of(node))
        if inputs["init_history"] is not None and inputs["action"] is None:
            found.append("has a history but no action")
        return found
