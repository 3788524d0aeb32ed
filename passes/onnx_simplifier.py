"""onnx-simplifier (onnxsim) on a graph of ours: it sees the structure, and nothing of what it drops is lost.

The simplifier takes ONNX bytes and gives ONNX bytes. Weights would make these large, and folding them is done before
(`dvexport/graph/fold.py`), so weights go in as inputs and come back as they are: the same arrays, none copied. Where a
node came from in the model, what it decides, and shapes that only the dialect's specifications know are given back by
the names of values, which the simplifier keeps. It leaves operators of the dialect alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from dvexport.graph.weights import SMALLEST
from dvexport.passes.same_numbers import check_same_numbers

__all__ = ["OnnxSimplifier", "simplify_structure"]

_LARGEST = "16KB"
"""What folding makes at most: a table that is laid out would be stored instead of what it is made of."""


class OnnxSimplifier(ir.passes.InPlacePass):
    """Run the simplifier on a lowered graph. Requires: standard operators. Raises PassError on other numbers.

    It folds shapes that are known, so whatever hangs on one, as the order of `UpdateInPlace`, has to be written later.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Simplify in place; compare on noise if anything changed."""
        before = model.clone()
        if not simplify_structure(model):
            return ir.passes.PassResult(model, modified=False)
        check_same_numbers(before, model)
        return ir.passes.PassResult(model, modified=True)


def simplify_structure(model: ir.Model) -> bool:
    """Simplify a graph in place and tell whether that made a difference; numbers are not compared."""
    import onnxsim

    weights = {
        name: value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes >= SMALLEST
    }
    apart = _without(model, weights)
    proto, _ = onnxsim.simplify(
        ir.to_proto(apart), certify=False, include_subgraph=True, import_custom_schemas=False,
        tensor_size_threshold=_LARGEST,
    )  # fmt: skip
    simpler = ir.from_proto(proto).graph
    if _text(simpler) == _text(apart.graph):
        return False
    for name, weight in weights.items():
        value = next(value for value in simpler.inputs if value.name == name)
        simpler.inputs.remove(value)
        value.const_value, value.shape, value.type = weight.const_value, weight.shape, weight.type
        if value.uses():
            simpler.initializers.add(value)
    _give_back(model.graph, simpler)
    model.graph = simpler
    return True


def _without(model: ir.Model, weights: dict[str, ir.Value]) -> ir.Model:
    """Return a copy of a model in which these initializers are inputs, without metadata."""
    copy = model.clone()
    for name in weights:
        value = copy.graph.initializers.pop(name)
        value.const_value = None
        copy.graph.inputs.append(value)
    return copy


def _text(graph: ir.Graph) -> list[tuple[object, ...]]:
    """Return a graph node by node, in order, without what may be told in two ways."""
    return [
        (node.domain, node.op_type, tuple(value and value.name for value in node.inputs),
         tuple(value.name for value in node.outputs))
        for node in graph.all_nodes()
    ]  # fmt: skip


def _give_back(old: ir.Graph, new: ir.Graph) -> None:
    """Give nodes and values of a simplified graph what the original ones of the same name had."""
    values = {value.name: value for value in _values(old)}
    for node in new.all_nodes():
        for value in node.outputs:
            known = values.get(value.name)
            if known is not None:
                value.shape, value.type = known.shape or value.shape, known.type or value.type
                producer = known.producer()
                if producer is not None:
                    node.metadata_props.update(producer.metadata_props)
        if not node.metadata_props:
            node.metadata_props.update(_inherited(node))
    for value in (*new.inputs, *new.outputs):
        known = values.get(value.name)
        if known is not None:
            value.shape, value.type = known.shape, known.type
    new.name = old.name


def _inherited(node: ir.Node) -> dict[str, str]:
    """Return the metadata of the first node that a new one reads and that has any: it stands behind it."""
    makers = (value.producer() for value in node.inputs if value is not None)
    return next((dict(maker.metadata_props) for maker in makers if maker is not None and maker.metadata_props), {})


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs
