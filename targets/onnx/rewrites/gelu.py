"""GELU in operators that every opset has. Opset 20 brought its own, which ONNX Runtime fuses with nothing."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from dvexport.graph.graph import Builder, replace_node
from dvexport.graph.match import is_op

__all__ = ["ExpandGelu"]


class ExpandGelu(ir.passes.InPlacePass):
    """Write every `Gelu` as what ONNX Runtime makes its fused kernels of: x / sqrt(2), Erf, + 1, times x, times 1/2.

    The approximation by tanh is left alone: `emit` refuses it below opset 20.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph and those inside its nodes."""
        found = [node for node in model.graph.all_nodes() if _is_exact(node)]
        for node in found:
            _expand(node)
        return ir.passes.PassResult(model, modified=bool(found))


def _is_exact(node: ir.Node) -> bool:
    approximate = node.attributes.get("approximate")
    return is_op(node, "Gelu") and (not approximate or approximate.as_string() == "none")


def _expand(node: ir.Node) -> None:
    (x,) = node.inputs
    assert x is not None
    build = Builder(metadata=node.metadata_props)
    one, half, root = (build.const(v, np.float32) for v in (1.0, 0.5, math.sqrt(2)))
    share = build.op("Add", build.op("Erf", build.op("Div", x, root)), one)
    replace_node(node, build, [build.op("Mul", build.op("Mul", x, share), half)])
