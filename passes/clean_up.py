"""Share what is equal and drop what is unused, at the end of every pipeline."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from dvexport.graph.graph import make_contiguous
from dvexport.graph.state import remove_state, states_of

__all__ = ["CleanUp"]


class CleanUp(ir.passes.InPlacePass):
    """Dead code, dead states, equal constants and equal expressions, in that order."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run onnx-ir's own passes until states settle."""
        common.RemoveUnusedNodesPass()(model)
        while _drop_dead_state(model):
            common.RemoveUnusedNodesPass()(model)
        common.TopologicalSortPass()(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        make_contiguous(model)
        for step in (
            common.DeduplicateHashedInitializersPass(size_limit=1 << 40),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.RemoveUnusedOpsetsPass(),
            common.NameFixPass(),
        ):
            step(model)
        _name_branches(model)
        return ir.passes.PassResult(model, modified=True)


def _drop_dead_state(model: ir.Model) -> bool:
    """Drop one state that nothing reads."""
    for state in states_of(model):
        read = next(v for v in model.graph.inputs if v.name == state.input)
        if not read.uses() and not read.is_graph_output():
            remove_state(model, state.name)
            return True
    return False


def _name_branches(model: ir.Model) -> None:
    """Give values inside conditionals names of their own: each branch is built apart from the graph."""
    for index, graph in enumerate(model.graph.subgraphs()):
        values = [value for node in graph for value in node.outputs] + list(graph.initializers.values())
        for position, value in enumerate(values):
            value.name = f"branch{index}.{position}"
        for position, node in enumerate(graph):
            node.name = f"branch{index}.{node.op_type}{position}"
