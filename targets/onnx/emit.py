"""From a lowered model to the bytes of an ONNX file, at the opset that the target's runtime reads.

Models are written in the opset of `dvexport.graph.graph`; `opset.py` writes them in an older one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from dvexport.graph.graph import DV, OPSET
from dvexport.graph.onnx_file import _proto, _serialized
from dvexport.graph.weights import Place, WeightFile
from dvexport.targets.onnx.opset import lower_opset

__all__ = ["ARTIFACT", "emit", "emit_apart"]

ARTIFACT = "model.onnx"
"""Name of the artifact inside a bundle."""


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
    lower_opset(proto, opset)
    return proto, weights
