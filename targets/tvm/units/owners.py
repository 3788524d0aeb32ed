"""Which gate a node belongs to, for profiles."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from dvexport.dialect.spec import operator_of
from dvexport.graph.graph import DECIDES, gate_name, scopes_of
from dvexport.graph.state import results_of

__all__ = ["gate_owners"]

_DECISIONS = ("rows", "tiles", "active_in", "action")
"""Inputs of dialect operators that carry a decision."""


def gate_owners(model: ir.Model, gates: Collection[str]) -> dict[ir.Node, str]:
    """Return the gate of every node that has one.

    A gate owns its convolutions and merges, nodes whose results make nothing but the gate's decision, and nodes traced
    in the gate's own module, as in a dense model. Nodes that are there to choose tokens (`passes/mark_decisions.py`)
    belong to `tokens`, which is no module.
    """
    owners: dict[ir.Node, str] = {}
    data: set[ir.Node] = set()
    produced = [value.producer() for value in results_of(model)]
    data.update(node for node in produced if node is not None)
    for node in reversed(list(model.graph)):
        operator = operator_of(node)
        if operator is not None:
            owners[node] = gate_name(node)
            inputs = operator.bind(node)
            _reach(data, [value for name, value in inputs.items() if name not in _DECISIONS])
            for name in _DECISIONS:
                _own(owners, inputs.get(name), gate_name(node))
        elif node in data:
            _reach(data, node.inputs)
            scopes = scopes_of(node)
            if len(scopes) > 1 and scopes[-2] in gates:
                owners[node] = scopes[-2]
        elif node in owners:
            for value in node.inputs:
                _own(owners, value, owners[node])
    found = {node: gate for node, gate in owners.items() if gate and (node not in data or _is_gates(node, gates))}
    return found | {node: node.metadata_props[DECIDES] for node in model.graph if DECIDES in node.metadata_props}


def _is_gates(node: ir.Node, gates: Collection[str]) -> bool:
    """Tell whether a node on the way to the outputs is a gate's own work, not what feeds its decision."""
    if operator_of(node) is not None:
        return True
    scopes = scopes_of(node)
    return len(scopes) > 1 and scopes[-2] in gates


def _reach(data: set[ir.Node], values: Collection[ir.Value | None]) -> None:
    for value in values:
        producer = None if value is None else value.producer()
        if producer is not None:
            data.add(producer)


def _own(owners: dict[ir.Node, str], value: ir.Value | None, gate: str) -> None:
    producer = None if value is None else value.producer()
    if producer is not None:
        owners.setdefault(producer, gate)
