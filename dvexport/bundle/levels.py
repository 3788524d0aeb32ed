"""The traced models inside a bundle: the gate level, and the dense level of a model that chooses tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from dvexport.bundle.archive import Bundle

__all__ = ["DENSE_LEVEL", "GATE_LEVEL", "read_gate_level", "read_level"]

DENSE_LEVEL = "dense_level.onnx"
"""Name of the model traced without pruning, for one that chooses tokens: the shapes of all that follows differ."""


GATE_LEVEL = "gate_level.onnx"
"""Name of the traced model inside a bundle: the oracle, and the source of the other variants."""


def read_level(bundle: Bundle, variant: str) -> ir.Model:
    """Return the traced model that a variant is made from; BundleError as `read_gate_level`."""
    from dvexport.bundle.graphs import read_model

    apart = variant == "dense" and DENSE_LEVEL in bundle.manifest.files
    return read_model(bundle, DENSE_LEVEL if apart else GATE_LEVEL)


def read_gate_level(bundle: Bundle) -> ir.Model:
    """Return the traced model of a bundle; BundleError if there is none or it can't be read."""
    from dvexport.bundle.graphs import read_model

    return read_model(bundle, GATE_LEVEL)
