"""The one reader of graphs in bundles: a graph refers to the manifest's weights and to nothing else.

ONNX lets every tensor be a reference to a file: initializers, dense and sparse, of the graph, of branches, of training;
constants in attributes. Readers resolve such a path in the working folder. ONNX Runtime has its own notions beside:
another file format under the same name, session options in the metadata, operators that load a compiled graph, a
location that is an address in memory. All of it is refused here, before onnx-ir or a runtime sees the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message

from dvexport.errors import BundleError
from dvexport.graph.graph import DOMAINS
from dvexport.graph.weights import KEYS, attach_weights, is_weight_file

if TYPE_CHECKING:
    import onnx_ir as ir

    from dvexport.bundle.archive import Bundle

__all__ = ["read_graph", "read_model"]

_MOST_TURNS = 1 << 20
"""Turns of all loops inside each other: windows of a transformer's blocks are some hundreds."""

_OPTIONS = "ort_config"
"""Metadata that ONNX Runtime can be made to take session options from, the names of files to write among them."""


def read_graph(bundle: Bundle, name: str) -> onnx.ModelProto:
    """Return a graph of a bundle, every reference to other files checked; its weights stay where they are.

    Raises:
        BundleError: there is none, it can't be read, or it refers to something other than the manifest's weights.
    """
    where = f"{bundle.path}, {name}"
    try:
        graph = onnx.load_model_from_string(bundle.read(name))
    except DecodeError as error:
        raise BundleError("a graph of the bundle can't be read", where=where, why=str(error)) from error
    graph.DiscardUnknownFields()  # type: ignore[no-untyped-call]  # another reader may know them
    _check_operators(graph, where)
    _check_references(graph, bundle, where)
    _check_loops(graph.graph, _constants(graph.graph), _MOST_TURNS, where)
    return graph


def read_model(bundle: Bundle, name: str) -> ir.Model:
    """Return a graph of a bundle with its weights, for onnx-ir; BundleError as `read_graph`."""
    graph = read_graph(bundle, name)
    try:
        return attach_weights(graph, bundle.array, where=str(bundle.path))
    except BundleError:
        raise
    except Exception as error:  # what onnx-ir raises of graphs that contradict themselves shares no base but this
        raise BundleError(
            "a graph of the bundle can't be read", where=f"{bundle.path}, {name}", why=str(error) or repr(error)
        ) from error


def _check_operators(graph: onnx.ModelProto, where: str) -> None:
    for function in graph.functions:  # export leaves none, and one may stand in for any operator
        raise _refused("it brings an operator along", where, f"{function.name} of domain '{function.domain}'")
    for node in _messages(graph, onnx.NodeProto):
        if node.domain not in DOMAINS:
            raise _refused("it has an operator that no bundle has", where, f"{node.op_type} of domain '{node.domain}'")
    if any(entry.key == _OPTIONS for entry in graph.metadata_props):
        raise _refused("it brings options for the runtime", where, f"metadata '{_OPTIONS}'")


def _check_loops(graph: onnx.GraphProto, constants: Mapping[str, int], most: int, where: str) -> None:
    """Refuse a loop that may not end: its number of turns has to be a constant, and all of them together few."""
    for node in graph.node:
        inner, left = [attribute.g for attribute in node.attribute if attribute.HasField("g")], most
        if node.op_type == "Loop":
            turns = constants.get(node.input[0])
            if turns is None or not 0 <= turns <= most:
                said = "no constant number of turns" if turns is None else f"{turns} turns, of {most} that it may have"
                raise _refused("it has a loop that may not end", where, f"Loop '{node.name}' has {said}")
            left = most // max(turns, 1)
        for each in inner:
            _check_loops(each, {**constants, **_constants(each)}, left, where)


def _constants(graph: onnx.GraphProto) -> dict[str, int]:
    """Return the whole numbers that a graph holds as constants, by name."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    tensors |= {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant" and node.output
        for attribute in node.attribute
        if attribute.name == "value"
    }
    single = {name: t for name, t in tensors.items() if t.data_type == onnx.TensorProto.INT64 and not _refers(t)}
    return {
        name: int(onnx.numpy_helper.to_array(tensor).ravel()[0])
        for name, tensor in single.items()
        if int(np.prod(tensor.dims, dtype=object)) == 1 and len(tensor.raw_data) in (0, 8)
    }


def _check_references(graph: onnx.ModelProto, bundle: Bundle, where: str) -> None:
    weights = [tensor for tensor in graph.graph.initializer if _refers(tensor)]
    if sum(map(_refers, _messages(graph, onnx.TensorProto))) > len(weights):
        raise _refused("a constant inside it refers to a file", where, "only weights of the graph itself may")
    names = Counter(tensor.name for tensor in graph.graph.initializer)
    for tensor in weights:
        keys = Counter(entry.key for entry in tensor.external_data)
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), None)
        known = [name for name in bundle.manifest.files if is_weight_file(name)]
        if location not in known:
            why = f"it is in a file '{location}', and the bundle's file of weights is {' or '.join(known) or 'none'}"
        elif max(keys.values()) > 1 or keys.keys() - KEYS:
            why = f"of its place it says {', '.join(keys.elements())}"
        elif names[tensor.name] > 1:
            why = "there are two of its name"
        elif tensor.data_location != onnx.TensorProto.EXTERNAL:
            why = "it says where it is in another file, and that it is in none"
        else:
            continue
        raise BundleError("a weight can't be read", where=f"{where}, {tensor.name}", why=why)


def _refers(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL or len(tensor.external_data) > 0


def _messages(message: Message, kind: type) -> Iterator[Any]:
    """Yield every message of a kind anywhere inside another one."""
    left = [message]
    while left:
        one = left.pop()
        if isinstance(one, kind):
            yield one
        for field, value in one.ListFields():
            if field.message_type is not None:
                left += value if isinstance(value, _REPEATED) else [value]


_REPEATED = type(onnx.GraphProto().node)
"""A list of messages."""


def _refused(what: str, where: str, why: str) -> BundleError:
    return BundleError(f"a graph of the bundle is refused: {what}", where=where, why=why)
