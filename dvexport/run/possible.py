"""What a gate can decide at all, read off the graph that decides.

A policy that only skips or computes leaves no reuse to check, and its model may rely on that. So decisions are forced
to what the gate could have decided itself.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import onnx_ir as ir

from dvexport.decisions import Action
from dvexport.graph.graph import array_of

__all__ = ["possible_actions"]

_ALL = (Action.SKIP, Action.REUSE, Action.COMPUTE)
_MOST = 16
"""Values that are followed at most; what may have more counts as unknown."""
_SAME = {"Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Gather", "Expand", "Flatten", "Cast"}
_BOOLEAN = {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor", "IsNaN", "IsInf"}
_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "Add": lambda a, b: a + b, "Sub": lambda a, b: a - b, "Mul": lambda a, b: a * b, "Max": max, "Min": min,
}  # fmt: skip


def possible_actions(value: ir.Value) -> tuple[int, ...]:
    """Return the actions that a decision can be, in order; all three where the graph does not tell."""
    found = _values(value, {})
    kept = tuple(action for action in _ALL if found is None or action in found)
    return kept or _ALL


def _values(value: ir.Value | None, known: dict[ir.Value, frozenset[float] | None]) -> frozenset[float] | None:
    """Return the numbers that a value can hold, None where they are not known."""
    if value is None:
        return None
    if value not in known:
        known[value] = None
        found = _values_of(value, known)
        known[value] = None if found is None or len(found) > _MOST else found
    return known[value]


def _values_of(value: ir.Value, known: dict[ir.Value, frozenset[float] | None]) -> frozenset[float] | None:
    array = array_of(value)
    if array is not None:
        distinct = set(array.ravel().tolist()) if array.size < 1 << 16 else set()
        return frozenset(float(one) for one in distinct) or None
    node = value.producer()
    if node is None or node.domain:
        return None
    if node.op_type in _BOOLEAN:
        return frozenset({0.0, 1.0})
    if node.op_type == "ArgMax":
        return _places(node)
    if node.op_type in _SAME:
        return _cast(node, _values(node.inputs[0], known))
    if node.op_type in ("Where", "Concat"):
        parts = [_values(one, known) for one in node.inputs[1 if node.op_type == "Where" else 0 :]]
        return None if any(part is None for part in parts) else frozenset().union(*[part or () for part in parts])
    if node.op_type in _ARITHMETIC and len(node.inputs) == 2:
        left, right = (_values(one, known) for one in node.inputs)
        if left is not None and right is not None:
            return frozenset(_ARITHMETIC[node.op_type](a, b) for a, b in product(left, right))
    return None


def _places(node: ir.Node) -> frozenset[float] | None:
    """Return the places on the axis that an ArgMax looks along."""
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    size = shape[axis] if shape is not None else None
    return frozenset(float(i) for i in range(size)) if isinstance(size, int) and size <= _MOST else None


def _cast(node: ir.Node, values: frozenset[float] | None) -> frozenset[float] | None:
    """Return what a cast leaves of numbers; other operators that only move them leave them all."""
    if node.op_type != "Cast" or values is None:
        return values
    to = ir.DataType(node.attributes["to"].as_int())
    if to == ir.DataType.BOOL:
        return frozenset(float(one != 0) for one in values)
    return frozenset(float(int(one)) for one in values) if to.is_integer() else values
