"""Note on every node that takes decisions over tokens, or carries them out, that it is there for pruning.

What pruning itself costs is measured by these notes: selections are spread over groups and stages, and no module
of the model holds them.
"""

from __future__ import annotations

import onnx_ir as ir

from dvexport.decisions import TOKENS
from dvexport.dialect.flops import dense_nodes
from dvexport.dialect.spec import operator_of
from dvexport.graph.graph import DECIDES

__all__ = ["MarkDecisions"]


class MarkDecisions(ir.passes.InPlacePass):
    """Mark selections and what only they need. Requires: gate level. Changes no number."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Leave models without tokens as they are."""
        selections = {node for node in model.graph if _selects(node)}
        if not selections:
            return ir.passes.PassResult(model, modified=False)
        kept = dense_nodes(model) - selections
        for node in model.graph:
            if node not in kept:
                node.metadata_props[DECIDES] = TOKENS.name
        return ir.passes.PassResult(model, modified=True)


def _selects(node: ir.Node) -> bool:
    operator = operator_of(node)
    return operator is not None and TOKENS.name in operator.decisions
