"""Types and shapes that expansions leave out, from the operands."""

from __future__ import annotations

import onnx_ir as ir

from dvexport.dialect.spec import specification
from dvexport.graph.graph import DV
from dvexport.graph.match import is_op

__all__ = ["FillTypes"]

_KEEPS_TYPE = ("Conv", "Relu", "Add", "Mul", "Sub", "Div", "MaxPool", "AveragePool", "Clip")


class FillTypes(ir.passes.InPlacePass):
    """Give results the type of their operands, and what a Relu reads the shape of its result."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fill in node by node, in order."""
        filled = 0
        for node in model.graph:
            read = node.inputs[0] if node.inputs else None
            if read is None:
                continue
            if is_op(node, "Relu") and read.shape is None and node.outputs[0].shape is not None:
                read.shape = node.outputs[0].shape
                filled += 1
            for value in node.outputs:
                if value.type is None and is_op(node, *_KEEPS_TYPE):
                    value.type = read.type
                    filled += 1
            if is_op(node, "SelectTokens", domain=DV) and any(value.type is None for value in node.outputs):
                specification(node).infer(node)
                filled += 1
        return ir.passes.PassResult(model, modified=filled > 0)
