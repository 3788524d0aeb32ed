"""Write dialect operators as their reference: everything is computed, then masked.

Always legal, and saves nothing: the fallback of every other lowering.
"""

from __future__ import annotations

import onnx_ir as ir

from dvexport.dialect.spec import operator_of
from dvexport.graph import Builder, replace_node

__all__ = ["LowerMasked"]


class LowerMasked(ir.passes.InPlacePass):
    """Replace every remaining dialect node by its reference in standard ONNX."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Expand in graph order."""
        modified = False
        for node in list(model.graph):
            operator = operator_of(node)
            if operator is None:
                continue
            build = Builder(metadata=node.metadata_props)
            outputs = list(operator.expand(node, build))[: len(node.outputs)]
            replace_node(node, build, outputs)
            modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """No dialect node is left."""
        left = [node for node in model.graph.all_nodes() if operator_of(node) is not None]
        if left:
            raise ir.passes.PostconditionError(f"{len(left)} dialect nodes are left, first {left[0].name}")
