"""`dv.FrameMean(X) -> Y`: consensus over the frames seen so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from dvexport.dialect.spec import Operator
from dvexport.graph.graph import Builder, replace_node
from dvexport.graph.state import add_state, state_input

__all__ = ["FrameMean"]


class FrameMean(Operator):
    """`Y[n] = mean(X[0], ..., X[n])` along axis 0: the last row is the clip's consensus (TSN).

    X, Y: `[N, K]`. In a stream the state is the sum and the count.
    """

    name = "FrameMean"
    inputs = ("X",)
    outputs = ("Y",)
    attributes: ClassVar[Mapping[str, Any]] = {"name": None}

    def stream(self, model: ir.Model, node: ir.Node) -> None:
        """The running sum and the count are states."""
        (x,) = node.inputs
        assert x is not None
        name = node.attributes["name"].as_string()
        build = Builder(metadata=node.metadata_props)
        one = build.const(np.float32(1).reshape(1, 1))
        total_in, count_in = state_input(model, f"{name}.sum", x), state_input(model, f"{name}.count", one)
        total, count = build.op("Add", total_in, x), build.op("Add", count_in, one)
        replace_node(node, build, [build.op("Div", total, count)])
        add_state(model, f"{name}.sum", total_in, total)
        add_state(model, f"{name}.count", count_in, count)

    def reference(
        self, build: Builder, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any]
    ) -> Sequence[ir.Value]:
        """CumSum(X) / (1 .. N); for a known N one product with a constant matrix, which every backend has."""
        x = inputs["X"]
        known = None if x is None or x.shape is None else x.shape[0]
        if isinstance(known, int):
            mean = np.tri(known) / np.arange(1, known + 1)[:, None]
            return [build.op("MatMul", build.const(mean, np.float32), x)]
        total = build.op("CumSum", x, build.const(0, np.int64))
        frames = build.op("Squeeze", build.op("Shape", x, start=0, end=1))
        count = build.op(
            "Range", build.const(1, np.int64), build.op("Add", frames, build.const(1, np.int64)),
            build.const(1, np.int64),
        )  # fmt: skip
        column = build.op("Unsqueeze", build.op("Cast", count, to=ir.DataType.FLOAT), build.ints(1))
        return [build.op("Div", total, column)]

    def problems(self, node: ir.Node) -> list[str]:
        """One row of numbers a frame."""
        found = super().problems(node)
        x = node.inputs[0] if node.inputs else None
        if x is not None and x.shape is not None and len(x.shape) != 2:
            found.append(f"needs X [N, K], not {x.shape}")
        return found
