"""From a lowered model to the bytes of an ONNX file, at the opset that the target's runtime reads.

Models are written in the opset of `dvexport.graph`. An older opset is reached by changing its number:
nothing is converted, but every node is checked to mean the same in both, and refused otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

from dvexport.errors import UsageError
from dvexport.graph import DECIDES, DV, OPSET
from dvexport.targets.onnx.gelu import expand_gelu
from dvexport.targets.onnx.key_biases import fold_key_biases
from dvexport.targets.onnx.windows import loop_windows
from dvexport.weights import WeightFile, split_weights

__all__ = ["ARTIFACT", "MAX_BYTES", "emit", "emit_apart", "model_apart", "model_bytes"]

ARTIFACT = "model.onnx"
"""Name of the artifact inside a bundle."""

MAX_BYTES = (1 << 31) - (1 << 20)
"""Protocol buffers end at 2 GiB; a margin is left for what is not weights."""

_KEPT_METADATA = frozenset({"pkg.torch.onnx.name_scopes", DECIDES})
"""Where a node came from in the model, and that it decides. The exporter's stack traces are dropped: they
hold paths of the machine that exported, and would make equal exports differ."""

_REDEFINED = {"AveragePool": "ceil_mode", "LpPool": "ceil_mode", "GridSample": "", "Resize": "", "DFT": ""}
"""Operators that opset 19 or 20 defined anew where older ones have the same signature, and the attribute
that must be unset for them to mean the same (none: they never do)."""


def emit(lowered: ir.Model, *, opset: int = OPSET) -> bytes:
    """Return the ONNX file of a lowered model.

    Args:
        lowered: standard operators only; not modified.
        opset: what the target's runtime reads.

    Raises:
        UsageError: the model has 2 GiB or more, or an operator that `opset` defines otherwise.
    """
    left = {node.op_type for node in lowered.graph.all_nodes() if node.domain == DV}
    assert not left, f"not lowered: {left}"
    return _serialized(_at_opset(lowered, opset, None)[0])


def emit_apart(
    lowered: ir.Model, file: WeightFile | None = None, *, opset: int = OPSET
) -> tuple[bytes, dict[str, np.ndarray]]:
    """Return the ONNX file of a lowered model without its weights, and these by name.

    Args:
        file: gets the weights (`dvexport.weights.split_weights`).

    Raises:
        UsageError: an operator that `opset` defines otherwise.
    """
    proto, weights = _at_opset(lowered, opset, file or WeightFile())
    return _serialized(proto), weights


def model_apart(model: ir.Model, file: WeightFile | None = None) -> tuple[bytes, dict[str, np.ndarray]]:
    """Return the ONNX file of a model at any level without its weights, and these by name; see `emit_apart`."""
    proto, weights = _proto(model, file or WeightFile())
    return _serialized(proto), weights


def _at_opset(lowered: ir.Model, opset: int, file: WeightFile | None) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    lowered = lowered.clone()
    expand_gelu(lowered)
    fold_key_biases(lowered)
    loop_windows(lowered)
    proto, weights = _proto(lowered, file)
    if opset < OPSET:
        _lower_opset(proto, opset)
    return proto, weights


def model_bytes(model: ir.Model) -> bytes:
    """Return the ONNX file of a model at any level, dialect nodes included; UsageError as `emit`."""
    return _serialized(_proto(model, None)[0])


def _proto(model: ir.Model, file: WeightFile | None) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Return a model's text, and its weights where `file` takes them."""
    if file is None:
        _check_size(sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None))
        proto, weights = ir.to_proto(model), dict[str, np.ndarray]()
    else:
        proto, weights = split_weights(model, file)
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


def _lower_opset(proto: onnx.ModelProto, opset: int) -> None:
    """Declare `opset`, after checking that every node is legal there and means the same."""
    for graph in _graphs(proto.graph):
        for node in graph.node:
            _check_node(node, opset)
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset


def _check_node(node: onnx.NodeProto, opset: int) -> None:
    if node.domain not in ("", "ai.onnx"):
        return
    written = onnx.defs.get_schema(node.op_type, OPSET).since_version
    try:
        schema = onnx.defs.get_schema(node.op_type, opset)
    except onnx.defs.SchemaError:
        raise _unfit(node, opset, f"opset {opset} does not have it") from None
    if schema.since_version == written:
        return
    unknown = sorted({a.name for a in node.attribute} - set(schema.attributes))
    if unknown:
        raise _unfit(node, opset, f"opset {opset} does not know its attribute {unknown[0]}")
    if len(node.input) > schema.max_input:
        raise _unfit(node, opset, f"opset {opset} gives it at most {schema.max_input} inputs")
    attribute = _REDEFINED.get(node.op_type)
    if attribute is not None and not (attribute and _is_unset(node, attribute)):
        raise _unfit(node, opset, f"opset {written} redefined it")


def _is_unset(node: onnx.NodeProto, name: str) -> bool:
    return not any(attribute.name == name and attribute.i for attribute in node.attribute)


def _unfit(node: onnx.NodeProto, opset: int, why: str) -> UsageError:
    return UsageError(
        f"the artifact can't be written in opset {opset}",
        where=f"{node.op_type} node '{node.name}'",
        why=why,
        hint=f"give the target an opset of {OPSET}, if its runtime reads that",
    )
