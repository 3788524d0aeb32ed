"""Make the dense model: every channel computed in every tile, no gates left.

The dense artifact of the same weights is what realisation is measured against.
"""

from __future__ import annotations

import onnx_ir as ir

from dvexport.graph.graph import DV, gate_name
from dvexport.graph.state import remove_state, states_of

__all__ = ["DropGates"]


class DropGates(ir.passes.InPlacePass):
    """Remove decisions and histories from every `GatedConv`; policies become dead code."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Keep only X, W, B."""
        names = {state.name for state in states_of(model)}
        modified = False
        for node in model.graph:
            if node.domain != DV or node.op_type != "GatedConv":
                continue
            history = f"{gate_name(node)}.history"
            if len(node.outputs) > 1:
                if history in names:
                    remove_state(model, history)
                node.resize_outputs(1)
            node.resize_inputs(3)
            modified = True
        return ir.passes.PassResult(model, modified)
