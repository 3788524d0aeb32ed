"""What is computed from constants alone: biases of attention that a trace keeps as tables and places in them.

A graph stays small that way (`dvexport/graph/fold.py`). Kernels read a bias laid out in full, so the bias is laid
out here, once, for the weights file. Rows along the first axis, such as the few masks of many windows, are chosen by
the kernel (`kernels/window_attention.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from dvexport.graph.graph import array_of
from dvexport.graph.match import is_op, made_by

__all__ = ["LayOutTables", "chosen_rows"]


class LayOutTables(ir.passes.InPlacePass):
    """Replace what is computed from constants by constants; not rows that are only added to something."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lay out node by node, in order: what one makes may be all that the next one reads."""
        laid = 0
        for node in list(model.graph):
            if not is_op(node, *_VALUES) or _is_added(node):
                continue
            arrays = [array_of(value) for value in node.inputs]
            if all(array is not None for array in arrays):
                _lay_out(model, node, arrays)
                laid += 1
        return ir.passes.PassResult(model, modified=laid > 0)


def _lay_out(model: ir.Model, node: ir.Node, arrays: list) -> None:
    value, array = node.outputs[0], np.ascontiguousarray(_VALUES[node.op_type](node, arrays))
    made = ir.Value(name=value.name, shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=value.name))
    made.dtype = ir.DataType.from_numpy(array.dtype)
    ir.convenience.replace_all_uses_with(value, made, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    model.graph.register_initializer(made)


def chosen_rows(value: ir.Value | None) -> tuple[np.ndarray, ir.Value] | None:
    """Return which rows of which constant a value is, None if it is not made that way."""
    node = made_by(value, "Gather")
    if node is None or _axis(node) != 0:
        return None
    table, index = node.inputs
    rows, places = array_of(table), array_of(index)
    if table is None or rows is None or places is None or places.ndim != 1:
        return None
    return np.where(places < 0, places + len(rows), places), table


def _is_added(node: ir.Node) -> bool:
    users = [user for user, _ in node.outputs[0].uses()]
    return chosen_rows(node.outputs[0]) is not None and all(is_op(user, "Add") for user in users)


def _axis(node: ir.Node) -> int:
    return node.attributes.get_int("axis", 0)


def _transpose(node: ir.Node, arrays: list) -> np.ndarray:
    return arrays[0].transpose(node.attributes.get_ints("perm"))


def _reshape(node: ir.Node, arrays: list) -> np.ndarray:
    zero = node.attributes.get_int("allowzero", 0)
    shape = [
        arrays[0].shape[axis] if not size and not zero else int(size) for axis, size in enumerate(arrays[1].tolist())
    ]
    return arrays[0].reshape(shape)


_VALUES: dict[str, Callable[[ir.Node, list], np.ndarray]] = {
    "Gather": lambda node, arrays: np.take(arrays[0], arrays[1], axis=_axis(node)),
    "Reshape": _reshape,
    "Transpose": _transpose,
}
