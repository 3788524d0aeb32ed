"""The plane that a convolution makes, for code that runs without torch and without ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["output_size"]


def output_size(size: Sequence[int], kernel: Sequence[int], attributes: Mapping[str, Any]) -> tuple[int, int]:
    """Return height and width of a convolution's output, in pixels; below 1 where the window does not fit.

    Args:
        size, kernel: height and width of the input plane and of the window.
        attributes: `strides`, `pads` (top, left, bottom, right) and `dilations`, as ONNX's Conv has them.
    """
    pads, strides, dilations = attributes["pads"], attributes["strides"], attributes["dilations"]
    height, width = (
        (size[i] + pads[i] + pads[i + 2] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in range(2)
    )
    return height, width
