"""From a lowered model to the bytes of an ONNX file, at the opset that the target's runtime reads.

Models are written in the opset of `dvexport.graph.graph`. An older opset is reached by changing its number:
nothing is converted, but every node is checked to mean the same in both, and refused otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from dvexport.errors import UsageError
from dvexport.graph.graph import DV, OPSET
from dvexport.graph.onnx_file import _graphs, _proto, _serialized
from dvexport.graph.weights import Place, WeightFile

__all__ = ["ARTIFACT", "emit", "emit_apart"]

ARTIFACT = "model.onnx"
"""Name of the artifact inside a bundle."""


_REDEFINED: dict[str, tuple[str, int | bytes] | None] = {
    "AveragePool": ("ceil_mode", 1),
    "LpPool": ("ceil_mode", 1),
    "Resize": ("coordinate_transformation_mode", b"half_pixel_symmetric"),
    "GridSample": None,
    "DFT": None,
}
"""Operators that opset 19 or 20 defined anew where older ones have the same signature, and the attribute's value with
which they mean something else (none: they always do)."""


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
        file: gets the weights (`dvexport.graph.weights.split_weights`).

    Raises:
        UsageError: an operator that `opset` defines otherwise.
    """
    proto, weights = _at_opset(lowered, opset, (file or WeightFile()).add)
    return _serialized(proto), weights


def _at_opset(
    lowered: ir.Model, opset: int, put: Callable[[np.ndarray], Place] | None
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    proto, weights = _proto(lowered, put)
    if opset < OPSET:
        _lower_opset(proto, opset)
    return proto, weights


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
    other = _REDEFINED.get(node.op_type)
    if node.op_type in _REDEFINED and (other is None or _has(node, *other)):
        raise _unfit(node, opset, f"opset {written} redefined it")


def _has(node: onnx.NodeProto, name: str, value: int | bytes) -> bool:
    return any(one.name == name and onnx.helper.get_attribute_value(one) == value for one in node.attribute)


def _unfit(node: onnx.NodeProto, opset: int, why: str) -> UsageError:
    return UsageError(
        f"the artifact can't be written in opset {opset}",
        where=f"{node.op_type} node '{node.name}'",
        why=why,
        hint=f"give the target an opset of {OPSET}, if its runtime reads that",
    )
