"""The plane that a convolution makes, for code that runs without torch and without ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["output_size"]


def output_size(size: Sequence[int], kernel: Sequence[int], attributes: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the pixels of a convolution's output along each spatial axis; below 1 where the window does not fit.

    Args:
        size, kernel: pixels of the input plane and of the window along each axis, such as height and width.
        attributes: `strides`, `pads` (before the image along each axis, then after it) and `dilations`, as ONNX's Conv
            has them.
    """
    pads, strides, dilations = attributes["pads"], attributes["strides"], attributes["dilations"]
    rank = len(kernel)
    return tuple(
        (size[i] + pads[i] + pads[i + rank] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in range(rank)
    )
