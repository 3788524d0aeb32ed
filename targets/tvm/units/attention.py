"""Units of attention, and products of two activations.

Attention is found from its softmax: forwards to the product with the values, backwards to the scores and what is added
to them (`scores.py`). What only splits heads or transposes becomes part of the unit if nothing else reads it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from dvexport.graph.graph import array_of, static_shape
from dvexport.graph.match import is_op, only_user
from dvexport.targets.tvm.units.kinds import Family, Role
from dvexport.targets.tvm.units.scores import Added, read_scores
from dvexport.targets.tvm.units.unit import Unit
from dvexport.targets.tvm.units.views import LARGE, View, is_float, view_of

__all__ = ["FAMILY", "AttentionUnit"]

FAMILY = Family()

_MOST_BIASES = 3
"""The most biases one attention may have: by position, a mask, dropped keys."""


@dataclass(kw_only=True)
class AttentionUnit(Unit):
    """softmax(scale * q k^T + biases) v, or scale * q k^T alone.

    Attributes:
        q, k, v: as `[batches, heads, rows, columns]`, k not transposed; no v: no softmax.
        biases: added to the scores.
        scale: what the scores are multiplied by.
        tokens_first: the result is `[batches, queries, heads, width]`.
    """

    q: View
    k: View
    v: View | None = None
    biases: tuple[Added, ...] = ()
    scale: float = 1.0
    tokens_first: bool = False

    def grow(self) -> None:
        """Add the operators of views whose results only this unit reads."""
        between = {node for view in (self.q, self.k, self.v) if view is not None for node in view.nodes}
        own, grew = set(self.nodes), True
        while grew:
            found = [node for node in between - own if _only_read_by(node, own)]
            own.update(found)
            self.nodes += found
            grew = bool(found)


def _only_read_by(node: ir.Node, readers: Collection[ir.Node]) -> bool:
    return all(
        not value.is_graph_output() and all(user in readers for user, _ in value.uses()) for value in node.outputs
    )


@FAMILY.kind("attention", ops=("Softmax",), role=Role.COMPUTE, flat=True)
def _attention(node: ir.Node, images: Collection[ir.Value]) -> AttentionUnit | None:
    product = _weighted_sum(node)
    read = None if product is None else read_scores(node.inputs[0])
    if product is None or read is None or len(read.added) > _MOST_BIASES:
        return None
    factors, v = _factors(read.product), _rows(product.inputs[1])
    if factors is None or v is None or len(v.shape) != len(factors[0].shape):
        return None
    q, k = factors
    scale = read.scale * q.scale * k.scale
    if scale <= 0:
        return None
    unit = AttentionUnit(
        kind="attention", nodes=[*read.between, read.product, node, product], q=q, k=k, v=v, biases=read.added,
        scale=scale, reads=[q.base, k.base, v.base, *(each.value for each in read.added)],
    )  # fmt: skip
    _fuse_turn(unit, product)
    return unit


def _weighted_sum(softmax: ir.Node) -> ir.Node | None:
    """Return the product of weights `[..., queries, keys]` with the values, if a softmax is attention's."""
    weights = softmax.outputs[0]
    after, rank = only_user(weights), len(static_shape(weights))
    if after is None or not is_op(after, "MatMul") or after.inputs[0] is not weights or rank not in (3, 4):
        return None
    by_keys = softmax.attributes.get_int("axis", -1) % rank == rank - 1
    return after if by_keys and array_of(after.inputs[1]) is None else None


def _factors(scores: ir.Node) -> tuple[View, View] | None:
    """Return the views q and k of a product of scores, k by rows; None if they can't be read so."""
    left, right = scores.inputs
    if left is None or right is None or array_of(left) is not None or array_of(right) is not None:
        return None
    q, k = view_of(left, scaled=True), view_of(right, scaled=True)
    if not 2 <= len(q.shape) == len(k.shape) <= 4 or q.axis(-1) > 1:
        return None
    return q, k.turned()


def _rows(values: ir.Value | None) -> View | None:
    """Return the view v, None if it can't be read by rows."""
    v = None if values is None else view_of(values)
    return v if v is not None and v.axis(-1) <= 1 else None


def _fuse_turn(unit: AttentionUnit, product: ir.Node) -> None:
    """Fuse the transposition of heads and tokens, and the reshape that joins the heads."""
    turn = only_user(product.outputs[0])
    if turn is None or not is_op(turn, "Transpose") or tuple(turn.attributes.get_ints("perm", ())) != (0, 2, 1, 3):
        return
    unit.nodes.append(turn)
    unit.tokens_first = True
    join = only_user(turn.outputs[0])
    if join is not None and is_op(join, "Reshape"):
        unit.nodes.append(join)


@FAMILY.kind("product", ops=("MatMul",), role=Role.COMPUTE, flat=True)
def _product(node: ir.Node, images: Collection[ir.Value]) -> AttentionUnit | None:
    """Match two activations multiplied, such as cosines of tokens."""
    result = static_shape(node.outputs[0])
    if any(array_of(value) is not None or not is_float(value) for value in node.inputs) or prod(result) < LARGE:
        return None
    factors = _factors(node)
    if factors is None or len(result) != len(factors[0].shape):
        return None
    q, k = factors
    return AttentionUnit(kind="product", nodes=[node], q=q, k=k, scale=q.scale * k.scale, reads=[q.base, k.base])
