"""FLOPs as fvcore counts them, by which STA's tables are made (official code)."""

from __future__ import annotations

from math import prod

import onnx_ir as ir

from dvexport.dialect.flops import flop_table
from dvexport.graph.match import is_op

_LAYER_NORM = 5


def operator_flops(model: ir.Model) -> int:
    """Count a model's operators by fvcore's rules.

    Convolutions and matrix products 1 for each multiply-accumulate, batched ones included; layer norm 5 for each
    element; softmax, GELU, top-k, sums and gathers nothing. `Delay`, `FrameMean` and `SelectTokens` nothing.

    Args:
        model: gate level or lowered, every shape static, no gated convolutions (a model that reads whole clips).
    """
    table = flop_table(model)
    assert not table.gated
    norms = (node.outputs[0].shape for node in model.graph if is_op(node, "LayerNormalization"))
    return table.fixed + table.decisions + sum(_LAYER_NORM * prod(shape.numpy()) for shape in norms if shape)
