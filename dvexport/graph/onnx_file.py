"""A graph as ONNX bytes, its weights inside or in a file of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnx_ir as ir

from dvexport.errors import UsageError
from dvexport.graph.graph import DECIDES
from dvexport.graph.weights import Place, WeightFile, split_weights

__all__ = ["MAX_BYTES", "model_apart"]

MAX_BYTES = (1 << 31) - (1 << 20)
"""Protocol buffers end at 2 GiB; a margin is left for what is not weights."""


_KEPT_METADATA = frozenset({"pkg.torch.onnx.name_scopes", DECIDES})
"""Where a node came from in the model, and that it decides. The exporter's stack traces are dropped: they
hold paths of the machine that exported, and would make equal exports differ."""


def model_apart(model: ir.Model, file: WeightFile | None = None) -> tuple[bytes, dict[str, np.ndarray]]:
    """Return the ONNX file of a model at any level without its weights, for `attach_weights`, and these by name."""
    proto, weights = _proto(model, (file or WeightFile()).refer)
    return _serialized(proto), weights


def _proto(model: ir.Model, put: Callable[[np.ndarray], Place] | None) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Return a model's text, and its weights where `put` takes them (`split_weights`)."""
    if put is None:
        _check_size(sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None))
        proto, weights = ir.to_proto(model), dict[str, np.ndarray]()
    else:
        proto, weights = split_weights(model, put)
    proto.producer_name, proto.producer_version = "dvexport", ""
    for graph in _graphs(proto.graph):
        _strip_metadata(graph)
    return proto, weights


def _serialized(proto: onnx.ModelProto) -> bytes:
    _check_size(proto.ByteSize())
    return proto.SerializeToString(deterministic=True)


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise UsageError(
            f"the model has {size / 2**30:.1f} GiB, and an ONNX file ends at 2 GiB",
            hint="use a smaller width, or lowerings that keep fewer copies of the weights (--lowering GATE=masked)",
        )


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the graph and those inside its nodes (the branches of `If`)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _strip_metadata(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        _keep_only(node.metadata_props, _KEPT_METADATA)
        node.ClearField("doc_string")
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        _keep_only(value.metadata_props, frozenset())


def _keep_only(entries, keys: frozenset[str]) -> None:
    kept = [(entry.key, entry.value) for entry in entries if entry.key in keys]
    del entries[:]
    for key, value in kept:
        entries.add(key=key, value=value)
