"""Make the dense model: every channel computed in every tile, no gates left.

The dense artifact of the same weights is what realisation is measured against.
"""

from __future__ import annotations

import onnx_ir as ir

from dvexport.dialect.spec import operator_of

__all__ = ["DropGates"]


class DropGates(ir.passes.InPlacePass):
    """Remove decisions and histories from every operator of the dialect; policies become dead code."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Ask every operator what it is without its gate."""
        dropped = [
            operator.drop_gate(model, node) for node in model.graph if (operator := operator_of(node)) is not None
        ]
        return ir.passes.PassResult(model, any(dropped))
