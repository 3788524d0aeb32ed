"""Folding of constants, by onnxscript's optimizer: in traces, and again when a graph is simplified.

Constants of any size are folded, as batch norm has to go into gated weights. Left alone is what folding would blow
up: rows read from a table many times over. The attention of shifted windows adds 78 MB of masks, of which eight
differ, and biases of relative positions are 85 MB of 1 MB of learnt numbers (Video-Swin-T at 32 x 224 x 224). A
runtime that wants them laid out does that when it loads the graph.
"""

from __future__ import annotations

from math import prod

import onnx_ir as ir

from dvexport.graph.match import is_op

__all__ = ["fold_constants"]

_UNLIMITED = 1 << 40
_LARGE = 1 << 14
"""Bytes from which a table is read when it is needed."""


def fold_constants(model: ir.Model) -> None:
    """Run the optimizer on a model, in place."""
    from onnxscript import optimizer

    optimizer.optimize_ir(
        model,
        input_size_limit=_UNLIMITED,
        output_size_limit=_UNLIMITED,
        should_fold=lambda node: False if _blows_up(node) else None,
    )


def _blows_up(node: ir.Node) -> bool:
    """Tell whether a node makes more of a table than the table is; its indices are often shared."""
    if not is_op(node, "Gather"):
        return False
    rows, shape = node.inputs[0], node.outputs[0].shape
    table = None if rows is None else ir.convenience.get_const_tensor(rows)
    if table is None or shape is None or not all(isinstance(size, int) for size in shape):
        return False
    made = prod(shape.numpy()) * table.dtype.itemsize
    return made >= _LARGE and made > table.nbytes
