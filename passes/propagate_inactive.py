"""Tell consumers which input channels a gate left exactly zero.

A channel that is skipped is zero everywhere, and stays zero through operators that map zero to zero channel by
channel. A convolution that reads it may drop it from its reduction: it gets `active_in = (action != 0)`,
and an ordinary convolution becomes a gated one for it. Which operators can be promised that, and which standard
operators they stand for, their specifications say.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dvexport.decisions import ACTION, Action
from dvexport.dialect.spec import OPERATORS, Operator, operator_of
from dvexport.graph.graph import DV, Builder, gate_name, replace_node
from dvexport.graph.match import attributes_of, is_op

__all__ = ["PropagateInactive"]

_ZERO_TO_ZERO = ("Relu", "MaxPool", "AveragePool", "Identity", "Dropout")


class PropagateInactive(ir.passes.InPlacePass):
    """Walk from every node that takes actions to the nodes that read its output and can be promised zeros.

    Requires: gate level.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visit producers in graph order."""
        modified = False
        for node in list(model.graph):
            operator = operator_of(node)
            action = None if operator is None else operator.decided(node).get(ACTION.name)
            if action is None:
                continue
            for reader in _readers(node.outputs[0]):
                modified |= _promise(reader, node, action)
        return ir.passes.PassResult(model, modified)


def _readers(value: ir.Value) -> list[ir.Node]:
    """Nodes that read a value as their first input, directly or through zero-preserving operators."""
    found: list[ir.Node] = []
    for node, position in value.uses():
        if is_op(node, *_ZERO_TO_ZERO):
            found += _readers(node.outputs[0])
        elif position == 0:
            found.append(node)
    return found


def _promise(reader: ir.Node, producer: ir.Node, action: ir.Value) -> bool:
    """Promise a reader what actions leave active; return whether it can be promised anything, and was not before."""
    operator = operator_of(reader)
    if operator is None:
        operator = next((each for each in OPERATORS.values() if each.adopts(reader)), None)
        if operator is not None:
            _adopt(operator, reader, gate_name(producer), action)
        return operator is not None
    if not operator.promised or operator.bind(reader)[operator.promised] is not None:
        return False
    graph, build = reader.graph, Builder(metadata=reader.metadata_props)
    assert graph is not None
    active = _active(build, action)
    graph.insert_before(reader, build.nodes)
    place = operator.position(operator.promised)
    reader.resize_inputs(max(place + 1, len(reader.inputs)))
    reader.replace_input_with(place, active)
    return True


def _adopt(operator: Operator, reader: ir.Node, gate: str, action: ir.Value) -> None:
    """Replace a standard node by the operator whose ordinary form it is, promised what actions leave active."""
    build = Builder(metadata=reader.metadata_props)
    place = operator.position(operator.promised)
    inputs = [*reader.inputs, *[None] * (place - len(reader.inputs)), _active(build, action)]
    attributes = {name: value for name, value in attributes_of(reader).items() if name in operator.attributes}
    gated = build.op(operator.name, *inputs, domain=DV, **{"gate": gate, **attributes})
    replace_node(reader, build, [gated])


def _active(build: Builder, action: ir.Value) -> ir.Value:
    shape = list(action.shape or [])
    skipped = build.op("Equal", action, build.const(int(Action.SKIP), np.int64), shape=shape, dtype=ir.DataType.BOOL)
    return build.op("Not", skipped, shape=shape, dtype=ir.DataType.BOOL)
