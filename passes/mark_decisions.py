"""Note on every node that takes decisions over tokens, or carries them out, that it is there for pruning.

What pruning itself costs is measured by these notes: selections are spread over groups and stages, and no module
of the model holds them.
"""

from __future__ import annotations

import onnx_ir as ir

from dvexport.dialect.flops import dense_nodes
from dvexport.graph.graph import DECIDES, DV, TOKENS

__all__ = ["MarkDecisions"]


class MarkDecisions(ir.passes.InPlacePass):
    """Mark selections and what only they need. Requires: gate level. Changes no number."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Leave models without tokens as they are."""
        selections = {node for node in model.graph if node.domain == DV and node.op_type == "SelectTokens"}
        if not selections:
            return ir.passes.PassResult(model, modified=False)
        kept = dense_nodes(model) - selections
        for node in model.graph:
            if node not in kept:
                node.metadata_props[DECIDES] = TOKENS
        return ir.passes.PassResult(model, modified=True)
