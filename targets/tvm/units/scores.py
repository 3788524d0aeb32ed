"""The scores of attention, read backwards from its softmax: the product, a factor, and the biases that are added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from dvexport.graph.graph import array_of, static_shape
from dvexport.graph.match import is_op, only_user
from dvexport.targets.tvm.rewrites.tables import chosen_rows
from dvexport.targets.tvm.units.views import factor_of, is_float

__all__ = ["Added", "Scores", "read_scores"]


@dataclass(frozen=True)
class Added:
    """A bias of scores, `[parts, heads, queries, keys]` where it has all axes.

    Attributes:
        value: what lies in memory.
        parts: the part that each batch reads.
        part, head, row: strides in elements, 0 where all share one; a row's keys are neighbours.
    """

    value: ir.Value
    parts: tuple[int, ...]
    part: int
    head: int
    row: int


@dataclass(frozen=True)
class Scores:
    """What a softmax reads: scale * product + added.

    Attributes:
        product: the node that multiplies queries and keys.
        between: the nodes from the softmax back to the product.
    """

    product: ir.Node
    scale: float = 1.0
    added: tuple[Added, ...] = ()
    between: tuple[ir.Node, ...] = ()


def read_scores(value: ir.Value | None) -> Scores | None:
    """Return the scores that a softmax reads, None if they are not of that form or something else reads them."""
    scale, added, between = 1.0, list[Added](), list[ir.Node]()
    while value is not None and only_user(value) is not None:
        node = value.producer()
        if node is None:
            return None
        if is_op(node, "MatMul"):
            return Scores(node, scale, tuple(added), tuple(between))
        between.append(node)
        if is_op(node, "Mul", "Div") and not added:  # a bias would be scaled afterwards
            factor, value = factor_of(node), node.inputs[0]
            if factor is None:
                return None
            scale *= factor
        elif is_op(node, "Add"):
            value, bias = _parted(node, static_shape(value))
            if bias is None:
                return None
            added.append(bias)
        elif is_op(node, "Reshape"):
            value = _reshaped(node)
        else:
            return None
    return None


def _reshaped(node: ir.Node) -> ir.Value | None:
    """Return what a reshape reads, None if it changes queries or keys."""
    before = node.inputs[0]
    kept = before is not None and static_shape(before)[-2:] == static_shape(node.outputs[0])[-2:]
    return before if kept else None


def _parted(node: ir.Node, shape: Sequence[int]) -> tuple[ir.Value | None, Added | None]:
    """Return the scores and the bias of a sum of `shape`; no bias if neither operand is one."""
    left, right = node.inputs
    left_first = left is not None and static_shape(left) == tuple(shape) and array_of(left) is None
    scores, bias = (left, right) if left_first else (right, left)
    return scores, None if bias is None else _added(bias, tuple(shape))


def _added(bias: ir.Value, shape: tuple[int, ...]) -> Added | None:
    """Return how a bias repeats over scores `[..., batches, heads, queries, keys]`."""
    chosen = chosen_rows(bias)
    given = static_shape(bias)
    given = (1,) * (len(shape) - len(given)) + given
    if len(shape) < 3 or not is_float(bias) or any(size != 1 for size in given[:-4]):
        return None
    if len(shape) == 3:  # batches without heads
        shape, given = (shape[0], 1, *shape[1:]), (given[0], 1, *given[1:])
    wanted = shape[-4:]
    batches, heads, queries, keys = given = given[-4:]
    if keys != wanted[3] or any(size not in (1, whole) for size, whole in zip(given, wanted, strict=True)):
        return None
    value, parts = bias, tuple(range(batches)) if batches > 1 else (0,) * wanted[0]
    if chosen is not None and len(static_shape(bias)) >= 4:
        value, parts = chosen[1], tuple(chosen[0].tolist())
    part = 0 if value is bias and batches == 1 else heads * queries * keys
    return Added(value, parts, part, queries * keys if heads > 1 else 0, keys if queries > 1 else 0)
