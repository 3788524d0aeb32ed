"""Tell consumers which input channels a gate left exactly zero.

A channel that is skipped is zero everywhere, and stays zero through operators that map zero to zero channel by
channel. A convolution that reads it may drop it from its reduction: it gets `active_in = (action != 0)`,
and an ordinary convolution becomes a `GatedConv` for it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dvexport.decisions import Action
from dvexport.dialect.spec import specification
from dvexport.graph.graph import DV, Builder, array_of, gate_name, replace_node

__all__ = ["PropagateInactive"]

_ZERO_TO_ZERO = {"Relu", "MaxPool", "AveragePool", "Identity", "Dropout"}


class PropagateInactive(ir.passes.InPlacePass):
    """Walk from every `GatedConv` with an action to the convolutions that read its output.

    Requires: gate level.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visit producers in graph order."""
        modified = False
        for node in list(model.graph):
            if node.domain != DV or node.op_type != "GatedConv":
                continue
            operator = specification(node)
            action = operator.bind(node)["action"]
            if action is None:
                continue
            for reader in _readers(node.outputs[0]):
                modified |= _promise(reader, node, action)
        return ir.passes.PassResult(model, modified)


def _readers(value: ir.Value) -> list[ir.Node]:
    """Convolutions that read a value, directly or through zero-preserving operators."""
    found: list[ir.Node] = []
    for node, position in value.uses():
        if node.domain == "" and node.op_type in _ZERO_TO_ZERO:
            found += _readers(node.outputs[0])
        elif position == 0 and (node.domain, node.op_type) in ((DV, "GatedConv"), ("", "Conv")):
            found.append(node)
    return found


def _promise(reader: ir.Node, producer: ir.Node, action: ir.Value) -> bool:
    graph = reader.graph
    assert graph is not None
    if reader.op_type == "GatedConv" and len(reader.inputs) > 5 and reader.inputs[5] is not None:
        return False
    if reader.op_type == "Conv" and not _can_be_gated(reader):
        return False
    build = Builder(metadata=reader.metadata_props)
    shape = list(action.shape or [])
    skipped = build.op("Equal", action, build.const(int(Action.SKIP), np.int64), shape=shape, dtype=ir.DataType.BOOL)
    active = build.op("Not", skipped, shape=shape, dtype=ir.DataType.BOOL)
    if reader.op_type == "GatedConv":
        graph.insert_before(reader, build.nodes)
        reader.resize_inputs(max(6, len(reader.inputs)))
        reader.replace_input_with(5, active)
        return True
    attributes = {
        name: reader.attributes[name].value for name in ("strides", "pads", "dilations") if name in reader.attributes
    }
    bias = reader.inputs[2] if len(reader.inputs) > 2 else None
    gated = build.op(
        "GatedConv", reader.inputs[0], reader.inputs[1], bias, None, None, active,
        domain=DV, activation="none", gate=gate_name(producer), **attributes,
    )  # fmt: skip
    replace_node(reader, build, [gated])
    return True


def _can_be_gated(conv: ir.Node) -> bool:
    group = conv.attributes.get("group")
    explicit = "auto_pad" not in conv.attributes or conv.attributes["auto_pad"].as_string() == "NOTSET"
    return (group is None or group.as_int() == 1) and explicit and array_of(conv.inputs[1]) is not None
