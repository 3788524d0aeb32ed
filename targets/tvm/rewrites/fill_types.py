"""Types and shapes that expansions leave out, from the operands."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["FillTypes"]

_KEEPS_TYPE = frozenset({"Conv", "Relu", "Add", "Mul", "Sub", "Div", "MaxPool", "AveragePool", "Clip"})


class FillTypes(ir.passes.InPlacePass):
    """Give results the type of their operands, and what a Relu reads the shape of its result."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fill in node by node, in order."""
        filled = 0
        for node in model.graph:
            read = node.inputs[0] if node.inputs else None
            if read is None:
                continue
            if node.op_type == "Relu" and read.shape is None and node.outputs[0].shape is not None:
                read.shape = node.outputs[0].shape
                filled += 1
            for value in node.outputs:
                if value.type is None and node.op_type in _KEEPS_TYPE:
                    value.type = read.type
                    filled += 1
        return ir.passes.PassResult(model, modified=filled > 0)
