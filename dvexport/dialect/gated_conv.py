"""`dv.GatedConv`: a convolution whose output channels and tiles are gated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from dvexport.decisions import ACTION, TILES
from dvexport.dialect.conv import CONV_ATTRIBUTES, activate, conv_problems, conv_shape, dense_conv, infer_conv
from dvexport.dialect.gated_macs import GatedMacs
from dvexport.dialect.merge import merge
from dvexport.dialect.spec import Operator
from dvexport.graph.graph import Builder, array_of, gate_name
from dvexport.graph.match import is_op
from dvexport.graph.state import add_state, remove_state, state_input, states_of

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
    decisions: ClassVar[Mapping[str, str]] = {ACTION.name: "action", TILES.name: "tiles"}
    dense = ("X", "W", "B")
    part = "SparseConv"
    promised = "active_in"
    ordinary = "Conv"
    output_channels: ClassVar[Mapping[str, int]] = {"W": 0, "B": 0, "action": 1}
    input_channels: ClassVar[Mapping[str, int]] = {"W": 1, "active_in": 1}

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

    def gated_macs(self, node: ir.Node, actions: Mapping[ir.Value, str]) -> GatedMacs:
        """The whole convolution is the gate's."""
        inputs = self.bind(node)
        w, u = inputs["W"], node.outputs[0]
        assert w is not None and w.shape is not None and u.shape is not None
        cout, cin, *kernel = (int(size) for size in w.shape)  # type: ignore[arg-type]
        height, width = (int(size) for size in u.shape[2:])  # type: ignore[arg-type]
        return GatedMacs(
            gate=gate_name(node),
            node=node.name or "",
            cin=cin,
            cout=cout,
            taps=prod(kernel),
            size=(height, width),
            acts=inputs["action"] is not None,
            reads=_gate_behind(inputs["active_in"], actions),
            tiled=inputs["tiles"] is not None,
        )

    def adopts(self, node: ir.Node) -> bool:
        """A convolution of one group, with explicit padding and a constant weight."""
        explicit = node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
        ungrouped = node.attributes.get_int("group", 1) == 1
        return is_op(node, self.ordinary) and ungrouped and explicit and array_of(node.inputs[1]) is not None

    def drop_gate(self, model: ir.Model, node: ir.Node) -> bool:
        """Keep X, W and B; policies become dead code."""
        if len(node.outputs) > 1:
            history = f"{gate_name(node)}.history"
            if history in {state.name for state in states_of(model)}:
                remove_state(model, history)
            node.resize_outputs(1)
        node.resize_inputs(len(self.dense))
        return True

    def stream(self, model: ir.Model, node: ir.Node) -> None:
        """Keep V of the previous frame; `split_paths` may replace it by something lazier."""
        if self.bind(node)["action"] is None:
            return
        name = f"{gate_name(node)}.history"
        read = state_input(model, name, node.outputs[0])
        node.resize_inputs(len(self.inputs))
        node.replace_input_with(self.position("init_history"), read)
        node.resize_outputs(len(self.outputs))
        add_state(model, name, read, node.outputs[self.outputs.index("last_history?")])

    def problems(self, node: ir.Node) -> list[str]:
        """History needs an action; the weight must be constant."""
        inputs = self.bind(node)
        found = super().problems(node) + conv_problems(inputs, self.attributes_of(node))
        if inputs["init_history"] is not None and inputs["action"] is None:
            found.append("has a history but no action")
        return found


_COMPARISONS = {"Not", "Equal", "Greater", "Cast", "Identity"}
"""What lies between a gate's actions and a promise that some channels are zero."""


def _gate_behind(active_in: ir.Value | None, actions: Mapping[ir.Value, str]) -> str:
    """Return the gate whose actions a promise was derived from, or nothing where none is found."""
    if active_in is None or active_in in actions:
        return actions.get(active_in, "") if active_in is not None else ""
    node = active_in.producer()
    inputs = node.inputs if node is not None and is_op(node, *_COMPARISONS) else ()
    return next((gate for value in inputs if (gate := _gate_behind(value, actions))), "")
