"""A bias that depends on the key alone, as one more column of queries and keys.

The mask of dropped tokens is added to all scores of a window, heads times queries times the same row. As

    q . k + b  =  [q, 1] . [k, b]

it comes with the product, and a pass over the scores, which are many times as large as all else, is saved.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dvexport.graph.graph import Builder, array_of, known_shape
from dvexport.graph.match import is_op

__all__ = ["FoldKeyBiases"]

_AXES = 4
"""Windows, heads, queries, keys."""


class FoldKeyBiases(ir.passes.InPlacePass):
    """Take sums of scores and a bias `[windows or 1, 1, 1, keys]` into the product that makes the scores."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold bias after bias before every softmax."""
        folded = 0
        for node in list(model.graph):
            if not is_op(node, "Softmax"):
                continue
            while (found := _found(node)) is not None:
                _fold(*found)
                folded += 1
        model.graph.sort()  # a bias may be made after the product that takes it now
        return ir.passes.PassResult(model, modified=folded > 0)


def _found(softmax: ir.Node) -> tuple[ir.Node, ir.Value, ir.Value, ir.Node] | None:
    """Go from a softmax over the sums before it back to its product: such a sum, its two sides, and the product."""
    value = softmax.inputs[0]
    sums: list[tuple[ir.Node, ir.Value, ir.Value]] = []
    while value is not None:
        node = value.producer()
        if node is None or node.domain or len(value.uses()) != 1 or value.is_graph_output():
            return None
        if is_op(node, "MatMul"):
            sums = [each for each in sums if _is_of_keys(each[2], value)]
            dynamic = all(each is not None and array_of(each) is None for each in node.inputs)
            return (*sums[0], node) if sums and dynamic else None
        if not is_op(node, "Add"):
            return None
        left, right = node.inputs
        assert left is not None and right is not None
        scores, bias = (left, right) if known_shape(left) == known_shape(value) else (right, left)
        sums.append((node, scores, bias))
        value = scores
    return None


def _is_of_keys(bias: ir.Value, scores: ir.Value) -> bool:
    given, wanted = known_shape(bias), known_shape(scores)
    if len(given) != _AXES or len(wanted) != _AXES or array_of(bias) is not None:
        return False
    return given[1:] == (1, 1, wanted[3]) and given[0] == wanted[0]


def _fold(node: ir.Node, scores: ir.Value, bias: ir.Value, product: ir.Node) -> None:
    queries, keys = product.inputs
    assert queries is not None and keys is not None and product.graph is not None
    windows, heads, rows, depth = known_shape(queries)
    count = known_shape(keys)[3]
    build = Builder(metadata=product.metadata_props)
    ones = build.const(np.float32(1))
    longer = build.op("Pad", queries, build.ints(0, 0, 0, 0, 0, 0, 0, 1), ones, shape=[windows, heads, rows, depth + 1],
                      dtype=queries.dtype)  # fmt: skip
    each_head = build.op("Add", bias, build.const(np.zeros((1, heads, 1, 1), np.float32)), dtype=bias.dtype,
                         shape=[windows, heads, 1, count])  # fmt: skip
    higher = build.op("Concat", keys, each_head, axis=2, dtype=keys.dtype, shape=[windows, heads, depth + 1, count])
    product.graph.insert_before(product, build.nodes)
    product.replace_input_with(0, longer)
    product.replace_input_with(1, higher)
    ir.convenience.replace_all_uses_with(node.outputs[0], scores)
    product.graph.remove(node, safe=True)
