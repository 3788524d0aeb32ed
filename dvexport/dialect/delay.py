"""`dv.Delay(X, init) -> Y`: the previous frame's value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from dvexport.dialect.spec import Operator
from dvexport.graph.graph import Builder

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

    def reference(
        self, build: Builder, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any]
    ) -> Sequence[ir.Value]:
        """Concat(init, X)[:-1]."""
        joined = build.op("Concat", inputs["init"], inputs["X"], axis=0)
        return [build.op("Slice", joined, build.ints(0), build.ints(-1), build.ints(0))]
