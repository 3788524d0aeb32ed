"""GELU in operators that every opset has. Opset 20 brought its own, which ONNX Runtime fuses with nothing."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from dvexport.graph.graph import Builder, replace_node

__all__ = ["expand_gelu"]


def expand_gelu(model: ir.Model) -> None:
    """Write every `Gelu` as what ONNX Runtime makes its fused kernels of: x / sqrt(2), Erf, + 1, times x, times 1/2.

    In place. The approximation by tanh is left alone: `emit` refuses it below opset 20.
    """
    for node in list(model.graph.all_nodes()):
        approximate = node.attributes.get("approximate")
        if node.op_type != "Gelu" or node.domain or (approximate and approximate.as_string() != "none"):
            continue
        (x,) = node.inputs
        assert x is not None
        build = Builder(metadata=node.metadata_props)
        one, half, root = (build.const(v, np.float32) for v in (1.0, 0.5, math.sqrt(2)))
        share = build.op("Add", build.op("Erf", build.op("Div", x, root)), one)
        replace_node(node, build, [build.op("Mul", build.op("Mul", x, share), half)])
