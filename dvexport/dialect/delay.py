"""`dv.Delay(X, init) -> Y`: the previous frame's value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from dvexport.dialect.spec import Operator
from dvexport.errors import TraceError
from dvexport.graph.graph import Builder, array_of, replace_node, source_of
from dvexport.graph.state import add_state, state_input

__all__ = ["Delay"]


class Delay(Operator):
    """`Y[0] = init`, `Y[n] = X[n-1]` along axis 0, the frame axis.

    X, Y: `[N, ...]`; init: `[1, ...]`, the value before the first frame. The only operator, with
    the history inside `GatedConv` and the sum inside `FrameMean`, that crosses frames. `name` names
    the state that a stream keeps.
    """

    name = "Delay"
    inputs = ("X", "init")
    outputs = ("Y",)
    attributes: ClassVar[Mapping[str, Any]] = {"name": None}

    def stream(self, model: ir.Model, node: ir.Node) -> None:
        """The value of this frame is the state that the next one reads."""
        x, init = node.inputs
        assert x is not None
        name = node.attributes["name"].as_string()
        start = array_of(init)
        if start is None or np.any(start):
            raise TraceError("a stream's states start as zeros", where=f"{source_of(node)} has another init")
        read = state_input(model, name, x)
        replace_node(node, Builder(), [read])
        add_state(model, name, read, x)

    def reference(
        self, build: Builder, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any]
    ) -> Sequence[ir.Value]:
        """Concat(init, X)[:-1]."""
        joined = build.op("Concat", inputs["init"], inputs["X"], axis=0)
        return [build.op("Slice", joined, build.ints(0), build.ints(-1), build.ints(0))]
