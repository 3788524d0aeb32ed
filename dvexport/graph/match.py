"""Questions that whoever looks for a pattern in a graph asks of its nodes and values.

There is no pattern language: the patterns here are few, and each reads best as the conditions it consists of.
Numbers of constants and static shapes are in `dvexport/graph/graph.py`; attributes have getters with defaults of
their own (`node.attributes.get_ints("strides", default)`).
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

__all__ = ["attributes_of", "is_op", "made_by", "only_user", "other_input"]


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> bool:
    """Tell whether a node is one of these operators of a domain, by default the standard one."""
    if node is None or node.op_type not in op_types:
        return False
    return node.domain == domain or (not domain and node.domain == "ai.onnx")


def made_by(value: ir.Value | None, *op_types: str, domain: str = "") -> ir.Node | None:
    """Return the node that makes a value if it is one of these operators; None otherwise."""
    node = value.producer() if value is not None else None
    return node if is_op(node, *op_types, domain=domain) else None


def only_user(value: ir.Value) -> ir.Node | None:
    """Return the node that reads a value if nothing else does, once, and the value is no output of the graph."""
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """Return the second operand of a node with two inputs of which `value` is one."""
    left, right = node.inputs
    return right if left is value else left


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """Return the attributes that a node was given, as plain values by name; defaults are not filled in."""
    return {name: attribute.value for name, attribute in node.attributes.items()}
