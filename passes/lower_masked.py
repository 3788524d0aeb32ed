"""Write dialect operators as their reference: everything is computed, then masked.

Always legal, and saves nothing: the fallback of every other lowering.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from dvexport.dialect.spec import operator_of
from dvexport.graph.graph import Builder, replace_node

__all__ = ["LowerMasked"]


class LowerMasked(ir.passes.InPlacePass):
    """Replace every remaining dialect node by its reference in standard ONNX.

    Args:
        keep: operators that the backend has kernels for.
    """

    def __init__(self, keep: Collection[str] = ()) -> None:
        super().__init__()
        self.keep = keep

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Expand in graph order."""
        modified = False
        for node in list(model.graph):
            operator = operator_of(node)
            if operator is None or operator.name in self.keep:
                continue
            build = Builder(metadata=node.metadata_props)
            outputs = list(operator.expand(node, build))[: len(node.outputs)]
            replace_node(node, build, outputs)
            modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """No dialect node is left but those kept."""
        found = [(operator_of(node), node) for node in model.graph.all_nodes()]
        left = [node for operator, node in found if operator is not None and operator.name not in self.keep]
        if left:
            raise ir.passes.PostconditionError(f"{len(left)} dialect nodes are left, first {left[0].name}")
