"""What a gated convolution may end with."""

from __future__ import annotations

__all__ = ["ACTIVATIONS"]

ACTIVATIONS = ("none", "relu")
"""Names of the activations, for code that runs without torch."""
