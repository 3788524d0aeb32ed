"""Units of transformers: linear layers, attention, products of activations, norms, the choice of tokens.

Attention is found from its softmax: backwards to the scores and what is added to them, forwards to the product with the
values. What only splits heads or transposes is taken along where nobody else reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from dvexport.graph.graph import DV, array_of, static_shape
from dvexport.targets.tvm.machine.dtype import F32
from dvexport.targets.tvm.rewrites.tables import chosen_rows
from dvexport.targets.tvm.units.unit import Unit
from dvexport.targets.tvm.units.views import View, is_dense, is_static, view_of

__all__ = ["Added", "AttentionUnit", "LinearUnit", "ViewUnit", "token_units"]

_FEW_ROWS = 16
"""Rows below which a product is bound by reading the weights: those are `kernels/dense.py`'s."""

_LARGE = 1 << 12
"""Elements from which a view is worth more than the copy in an island, which may be fused with others."""

_MOST_BIASES = 3
"""Of one attention: by position, mask, dropped keys."""

_LINE = F32.line
"""Floats that parts of a buffer are aligned to."""


@dataclass
class LinearUnit(Unit):
    """act(x W + bias) + residual; W `[K, N]`."""

    x: ir.Value = None  # type: ignore[assignment]
    weight: np.ndarray = None  # type: ignore[assignment]
    bias: np.ndarray | None = None
    activation: str = ""
    residual: ir.Value | None = None


@dataclass(frozen=True)
class Added:
    """A bias of scores, `[parts, heads, queries, keys]` where it has all axes.

    Attributes:
        value: what lies in memory.
        parts: of each batch, which part it reads.
        part, head, row: strides in elements, 0 where it has one for all; a row's keys are neighbours.
    """

    value: ir.Value
    parts: tuple[int, ...]
    part: int
    head: int
    row: int


@dataclass
class AttentionUnit(Unit):
    """softmax(scale * q k^T + biases) v, or scale * q k^T alone.

    Attributes:
        q, k, v: as `[batches, heads, rows, columns]`, k not transposed; no v: no softmax.
        biases: added to the scores.
        scale: of scores.
        tokens_first: the result is `[batches, queries, heads, width]`.
    """

    q: View = None  # type: ignore[assignment]
    k: View = None  # type: ignore[assignment]
    v: View | None = None
    biases: tuple[Added, ...] = ()
    scale: float = 1.0
    tokens_first: bool = False


@dataclass
class ViewUnit(Unit):
    """A value that is some neighbouring elements of another."""

    view: View = None  # type: ignore[assignment]


def token_units(model: ir.Model, planar: Collection[ir.Value]) -> Iterator[Unit]:
    """Yield the units of a model that are transformers' own; no node is in two. `planar`: values held as planes."""
    nodes = list(model.graph)
    order = {node: i for i, node in enumerate(nodes)}
    taken: set[ir.Node] = set()
    makers = (_attention, _product, _linear, _norm, _select, _scatter, _view)
    for make in makers:
        for node in nodes:
            if node in taken or any(value in planar for value in node.outputs) or not _has_shapes(node):
                continue
            unit = make(node)
            if unit is None or taken.intersection(unit.nodes) or not _reads_flat(unit, planar):
                continue
            _take_views(unit)
            unit.nodes = sorted(dict.fromkeys(unit.nodes), key=lambda each: order[each])
            unit.nodes = [each for each in unit.nodes if each not in taken]
            taken.update(unit.nodes)
            yield unit


def _has_shapes(node: ir.Node) -> bool:
    """Tell whether every shape at a node is known: inside of islands some are not."""
    return all(is_static(value) for value in (*node.inputs, *node.outputs) if value is not None)


def _reads_flat(unit: Unit, planar: Collection[ir.Value]) -> bool:
    """Tell whether nothing that a unit reads by strides is held as planes; inputs of the model lie flat."""
    return all(value not in planar or value.is_graph_input() for value in unit.reads or ())


def _take_views(unit: Unit) -> None:
    """Take the operators of views along whose results only the unit reads."""
    views = [view for view in (getattr(unit, name, None) for name in ("q", "k", "v")) if view is not None]
    between = {node for view in views for node in view.nodes}
    own = set(unit.nodes)
    changed = True
    while changed:
        changed = False
        for node in between - own:
            uses = [user for value in node.outputs for user, _ in value.uses()]
            if all(user in own for user in uses) and not any(value.is_graph_output() for value in node.outputs):
                own.add(node)
                unit.nodes.append(node)
                changed = True


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype in (ir.DataType.FLOAT, None) and value.shape is not None


def _only_user(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    left, right = node.inputs
    return right if left is value else left


def _linear(node: ir.Node) -> LinearUnit | None:
    if node.domain or node.op_type not in ("MatMul", "Gemm") or not _is_float(node.inputs[0]):
        return None
    x, weight = node.inputs[0], array_of(node.inputs[1])
    if x is None or weight is None or weight.ndim != 2 or array_of(x) is not None or len(static_shape(x)) < 2:
        return None
    bias = None
    if node.op_type == "Gemm":
        numbers = [node.attributes[key].as_float() for key in ("alpha", "beta") if key in node.attributes]
        turned = {key: node.attributes[key].as_int() for key in ("transA", "transB") if key in node.attributes}
        bias = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
        plain = all(number == 1 for number in numbers) and not turned.get("transA", 0)
        if not plain or (len(node.inputs) > 2 and node.inputs[2] is not None and bias is None):
            return None
        weight = weight.T if turned.get("transB", 0) else weight
        if bias is not None and bias.shape != (weight.shape[1],):
            return None
    if prod(static_shape(x)[:-1]) < _FEW_ROWS:
        return None
    unit = LinearUnit("linear", [node], x=x, weight=weight, bias=bias)
    _take_along(unit)
    return unit


def _take_along(unit: LinearUnit) -> None:
    """Fuse what follows where nobody else reads what is between: a bias, an activation, a sum."""
    value = unit.nodes[-1].outputs[0]
    shape = static_shape(value)
    after = _only_user(value)
    if after is not None and after.op_type == "Add" and unit.bias is None:
        constant = array_of(_other(after, value))
        if constant is not None and constant.shape == (shape[-1],):
            unit.bias, value = constant, after.outputs[0]
            unit.nodes.append(after)
            after = _only_user(value)
    if after is not None and not after.domain and after.op_type in ("Relu", "Gelu"):
        form = after.attributes.get("approximate")
        if form is None or form.as_string() == "none":
            unit.activation, value = after.op_type.lower(), after.outputs[0]
            unit.nodes.append(after)
            after = _only_user(value)
    if after is not None and after.op_type == "Add" and not after.domain:
        other = _other(after, value)
        if other is not None and other is not value and _is_float(other) and static_shape(other) == shape:
            unit.residual = other
            unit.nodes.append(after)


def _norm(node: ir.Node) -> Unit | None:
    if node.op_type != "LayerNormalization" or node.domain or not _is_float(node.inputs[0]) or len(node.outputs) > 1:
        return None
    assert node.inputs[0] is not None
    rank = len(static_shape(node.inputs[0]))
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    constants = len(node.inputs) == 3 and all(array_of(value) is not None for value in node.inputs[1:])
    return Unit("layer_norm", [node]) if axis % rank == rank - 1 and constants else None


def _select(node: ir.Node) -> Unit | None:
    return Unit("select_tokens", [node]) if node.domain == DV and node.op_type == "SelectTokens" else None


def _scatter(node: ir.Node) -> Unit | None:
    """Single elements written along the last axis, every row at places of its own."""
    if node.op_type != "ScatterElements" or node.domain:
        return None
    given = node.attributes.get("reduction")
    if given is not None and given.as_string() != "none":
        return None
    x, index, updates = node.inputs
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if x is None or index is None or updates is None or index.dtype != ir.DataType.INT64:
        return None
    rank = len(static_shape(x))
    alike = static_shape(x)[:-1] == static_shape(index)[:-1] and axis % rank == rank - 1
    return Unit("scatter", [node]) if alike and x.dtype in (ir.DataType.FLOAT, ir.DataType.INT64) else None


def _view(node: ir.Node) -> ViewUnit | None:
    """Views that lie as one piece: parts of a split have one unit each, so only operators with one result."""
    if node.domain or node.op_type not in ("Reshape", "Squeeze", "Unsqueeze", "Slice", "Split"):
        return None
    if any(value.is_graph_output() or not _is_float(value) for value in node.outputs):
        return None
    views = [view_of(value) for value in node.outputs]
    dense = all(is_dense(view) and view.nodes and view.offset % _LINE == 0 for view in views)
    base = views[0].base
    large = prod(static_shape(base)) >= _LARGE and base.dtype == ir.DataType.FLOAT
    own = all(view.base is base and view.nodes[-1:] == (node,) for view in views)
    if not dense or not large or not own or array_of(base) is not None:
        return None
    return ViewUnit("view", [node], reads=[base], view=views[0])


def _attention(node: ir.Node) -> AttentionUnit | None:
    """Find attention from its softmax."""
    if node.op_type != "Softmax" or node.domain:
        return None
    after = _only_user(node.outputs[0])
    weights = node.outputs[0]
    if after is None or after.op_type != "MatMul" or after.inputs[0] is not weights:
        return None
    shape = static_shape(weights)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    if len(shape) not in (3, 4) or axis % len(shape) != len(shape) - 1 or array_of(after.inputs[1]) is not None:
        return None
    found = _scores(node.inputs[0])
    if found is None or len(found[2]) > _MOST_BIASES:
        return None
    scores, scale, added, between = found
    q, k, v = _factors(scores, after.inputs[1])
    if q is None or k is None or v is None or v.axis(-1) > 1:
        return None
    unit = AttentionUnit(
        "attention", [*between, scores, node, after], q=q, k=k, v=v, biases=tuple(added),
        scale=scale * q.scale * k.scale, reads=[q.base, k.base, v.base, *(each.value for each in added)],
    )  # fmt: skip
    if unit.scale <= 0:
        return None
    _turn_result(unit, after)
    return unit


def _scores(value: ir.Value | None) -> tuple[ir.Node, float, list[Added], list[ir.Node]] | None:
    """Go from the softmax's input back to the product: return it, a factor, what is added, and the nodes between."""
    scale, added, between = 1.0, list[Added](), list[ir.Node]()
    while value is not None:
        node = value.producer()
        if node is None or node.domain or _only_user(value) is None:
            return None
        if node.op_type == "MatMul":
            return node, scale, added, between
        if node.op_type in ("Mul", "Div"):
            array = array_of(node.inputs[1])
            if array is None or array.size != 1 or added:
                return None  # a bias that is scaled afterwards
            scale *= float(array.reshape(())) if node.op_type == "Mul" else 1 / float(array.reshape(()))
            before = node.inputs[0]
        elif node.op_type == "Add":
            left, right = node.inputs
            scores_left = left is not None and static_shape(left) == static_shape(value) and array_of(left) is None
            before, bias = (left, right) if scores_left else (right, left)
            found = None if bias is None else _added(bias, static_shape(value))
            if found is None:
                return None
            added.append(found)
        elif node.op_type == "Reshape":
            before = node.inputs[0]
            if before is None or static_shape(before)[-2:] != static_shape(value)[-2:]:
                return None
        else:
            return None
        between.append(node)
        value = before
    return None


def _added(bias: ir.Value, shape: tuple[int, ...]) -> Added | None:
    """Return how a bias repeats over scores `[..., batches, heads, queries, keys]`."""
    chosen = chosen_rows(bias)
    given = static_shape(bias)
    given = (1,) * (len(shape) - len(given)) + given
    if len(shape) < 3 or not _is_float(bias) or any(size != 1 for size in given[:-4]):
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


def _factors(scores: ir.Node, values: ir.Value | None) -> tuple[View | None, View | None, View | None]:
    """Return the views q, k and v of a product of scores; None for what is not readable by rows."""
    left, right = scores.inputs
    if left is None or right is None or values is None or array_of(left) is not None or array_of(right) is not None:
        return None, None, None
    q, k, v = view_of(left, scaled=True), view_of(right, scaled=True), view_of(values)
    if not len(q.shape) == len(k.shape) == len(v.shape) <= 4 or len(q.shape) < 2 or q.axis(-1) > 1:
        return None, None, None
    turned = View(
        k.base, k.offset, (*k.shape[:-2], *k.shape[:-3:-1]), (*k.strides[:-2], *k.strides[:-3:-1]), k.scale, k.nodes
    )
    return q, turned, v


def _turn_result(unit: AttentionUnit, product: ir.Node) -> None:
    """Take along the transposition of heads and tokens, and the reshape that joins the heads."""
    turn = _only_user(product.outputs[0])
    if turn is None or turn.op_type != "Transpose" or tuple(turn.attributes["perm"].as_ints()) != (0, 2, 1, 3):
        return
    unit.nodes.append(turn)
    unit.tokens_first = True
    join = _only_user(turn.outputs[0])
    if join is not None and join.op_type == "Reshape":
        unit.nodes.append(join)


def _product(node: ir.Node) -> AttentionUnit | None:
    """Two activations multiplied: cosines of tokens."""
    if node.op_type != "MatMul" or node.domain or node.outputs[0].shape is None:
        return None
    if any(array_of(value) is not None or not _is_float(value) for value in node.inputs):
        return None
    if prod(static_shape(node.outputs[0])) < _LARGE:
        return None
    q, k, _ = _factors(node, node.inputs[1])
    if q is None or k is None or len(static_shape(node.outputs[0])) != len(q.shape):
        return None
    return AttentionUnit("product", [node], q=q, k=k, scale=q.scale * k.scale, reads=[q.base, k.base])
