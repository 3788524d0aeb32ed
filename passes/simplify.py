"""Simplify a gate-level model with onnxscript's optimizer and onnx-simplifier, and compare the numbers after.

Constant folding, dead code and algebraic rules are not this project's business; the comparison is, because
an optimizer that breaks a model must not do so silently.
"""

from __future__ import annotations

import onnx_ir as ir

from dvexport.graph.fold import fold_constants
from dvexport.passes.onnx_simplifier import simplify_structure
from dvexport.passes.same_numbers import check_same_numbers

__all__ = ["Simplify"]


class Simplify(ir.passes.InPlacePass):
    """Run both optimizers. Requires: gate level, dynamic frame axis. Raises PassError on other numbers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Optimize in place; compare on three frames of noise through the references."""
        before, count = model.clone(), model.graph.num_nodes()
        fold_constants(model)
        simplify_structure(model)
        if _text(model) == _text(before):  # the trace was simple already: a large model need not run twice
            return ir.passes.PassResult(model, modified=False)
        check_same_numbers(before, model)
        return ir.passes.PassResult(model, model.graph.num_nodes() != count)


def _text(model: ir.Model) -> list[tuple[object, ...]]:
    """Return the graph node by node; values by name, constants as they are held."""
    return [
        (node.domain, node.op_type, [None if v is None else (v.name, id(v.const_value)) for v in node.inputs],
         [v.name for v in node.outputs], {name: str(a.value) for name, a in node.attributes.items()})
        for node in model.graph.all_nodes()
    ]  # fmt: skip
