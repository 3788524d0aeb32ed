"""Check that a model is legal: the dialect's own rules, and that states and shapes are in order.

Changes nothing; runs after every pass in tests and at the end of every pipeline.
"""

from __future__ import annotations

import onnx_ir as ir

from dvexport.dialect.spec import operator_of
from dvexport.errors import PassError
from dvexport.graph.graph import DOMAINS, DV, source_of
from dvexport.graph.state import states_of

__all__ = ["CheckDialect", "problems"]


def problems(model: ir.Model) -> list[str]:
    """Return what is illegal about a model, one sentence each."""
    found: list[str] = []
    for node in model.graph.all_nodes():
        if node.domain not in DOMAINS:
            found.append(f"{source_of(node)} is of domain {node.domain}, and bundles hold standard operators")
        operator = operator_of(node)
        if node.domain == DV and operator is None:
            found.append(f"{source_of(node)}: dv.{node.op_type} is not in the dialect")
        elif operator is not None:
            found += [f"{source_of(node)} {problem}" for problem in operator.problems(node)]
            if node.outputs[0].shape is None:
                found.append(f"{source_of(node)} has an output of unknown shape")
    inputs = {value.name: value for value in model.graph.inputs}
    outputs = {value.name: value for value in model.graph.outputs}
    for state in states_of(model):
        read, write = inputs.get(state.input), outputs.get(state.output)
        if read is None or write is None:
            found.append(f"state {state.name} lacks its {'input' if read is None else 'output'}")
        elif read.shape != write.shape or read.dtype != write.dtype:
            found.append(f"state {state.name} changes from {read.shape} to {write.shape}")
    names = [value.name for value in [*model.graph.inputs, *model.graph.outputs]]
    found += [f"the name {name} is used twice" for name in set(names) if names.count(name) > 1]
    return found


class CheckDialect(ir.passes.InPlacePass):
    """Raise PassError on the first thing that is illegal."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Check; never modifies."""
        found = problems(model)
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise PassError(f"the graph is not legal: {found[0]}{more}")
        return ir.passes.PassResult(model, modified=False)
