"""onnx-simplifier (`onnxsim`) on a graph in memory, without what it must not touch.

It sees no weights, which stand in for themselves as inputs: a protocol buffer ends at 2 GiB, weights are folded
already, and tables that `dvexport.graph.fold` left alone stay tables. It drops what nodes carry beside their meaning,
so that is given back by the name of the first output. Operators of the dialect are unknown to it and stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from dvexport.graph.weights import split_weights

__all__ = ["simplify_graph"]

_MOST_FOLDED = "16KB"
"""Constants above this size are not written out; `fold.py` says why."""


def simplify_graph(model: ir.Model) -> bool:
    """Run onnx-simplifier on a model, in place.

    Returns:
        Whether it left out any node. Otherwise the model is untouched.
    """
    import onnxsim

    inputs, initializers = len(model.graph.inputs), dict(model.graph.initializers)
    text = _without_weights(model)
    found, _ = onnxsim.simplify(text, certify=False, tensor_size_threshold=_MOST_FOLDED)
    if _count(found.graph) >= _count(text.graph):
        return False
    simpler = ir.from_proto(found)
    _carry_over(model, simpler)
    for value in list(simpler.graph.inputs)[inputs:]:
        simpler.graph.inputs.remove(value)  # before it is an initializer: else it still counts as an input
        assert value.name is not None
        value.const_value = initializers[value.name].const_value
        if value.uses() or value.is_graph_output():
            simpler.graph.register_initializer(value)
    model.graph = simpler.graph
    return True


def _without_weights(model: ir.Model) -> onnx.ModelProto:
    """Return the text of a model in which weights are inputs, after those that it has."""
    text, weights = split_weights(model)
    kept = [tensor for tensor in text.graph.initializer if tensor.name not in weights]
    for tensor in text.graph.initializer:
        if tensor.name in weights:
            text.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del text.graph.initializer[:]
    text.graph.initializer.extend(kept)
    return text


def _count(graph: onnx.GraphProto) -> int:
    """Return how many nodes there are, those in branches with them; constants are none."""
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return sum(node.op_type != "Constant" for node in graph.node) + sum(_count(one) for one in inner)


def _carry_over(old: ir.Model, new: ir.Model) -> None:
    """Give nodes and values what they carried, by the names of values; a new node gets what its reader carries."""
    known = {value.name: value for value in _values(old.graph)}
    for node in reversed(list(new.graph.all_nodes())):  # readers first
        was = known.get(node.outputs[0].name)
        made = was.producer() if was is not None else next((user for user, _ in node.outputs[0].uses()), None)
        if made is not None:
            node.metadata_props.update(made.metadata_props)
    for value in _values(new.graph):
        was = known.get(value.name)
        if was is not None and was.shape is not None:
            value.shape, value.type = was.shape, was.type


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    for node in graph.all_nodes():
        yield from node.outputs
