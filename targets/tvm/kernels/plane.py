"""How a plane lies in memory: rows that share their zero padding, so that a tap is a constant offset.

A tensor `[C, H, W]` is held as C planes of `Plane.size` floats. Pixel (y, x) of a plane is at
`base + y * pitch + x`. What is outside the image is zero, always: the columns between two rows (the right pad
of one and the left pad of the next), and rows above and below. A window that reaches over the edge reads zeros
without any test, and 16 neighbouring floats are one vector whatever the width of the image is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

__all__ = ["MOST_STEP", "Plane"]

MOST_STEP = 2
"""Columns from one output pixel's window to the next, at most, that kernels over planes read as vectors."""

_ALIGN = 16
"""Floats in 64 bytes: planes start on a cache line."""


@dataclass(frozen=True)
class Plane:
    """The layout of one channel.

    Attributes:
        height, width: of the image, in pixels.
        pad: zero pixels that windows may reach beyond each edge.
    """

    height: int
    width: int
    pad: int = 1

    @cached_property
    def pitch(self) -> int:
        """Floats from one row to the next: at least `width + pad`, and room for tiles of 4 to overshoot."""
        return max(self.width + self.pad, -(-self.width // 4) * 4)

    @cached_property
    def base(self) -> int:
        """Offset of pixel (0, 0): the rows above, rounded up to a cache line."""
        return _up(self.pad * self.pitch + self.pad)

    @cached_property
    def size(self) -> int:
        """Floats of a plane: rows above and below, and a vector's overshoot at the end."""
        below = max(self.pad, 1) + (-self.height % 4) + 1
        return _up(self.base + (self.height + below) * self.pitch + 2 * _ALIGN)

    def offset(self, y: int, x: int) -> int:
        """Offset of a pixel, which may lie in the padding."""
        return self.base + y * self.pitch + x

    def taps(self, kernel: tuple[int, int], dilation: tuple[int, int] = (1, 1)) -> list[int]:
        """Offsets of a window's pixels from its top left one, row by row."""
        return [dy * dilation[0] * self.pitch + dx * dilation[1] for dy in range(kernel[0]) for dx in range(kernel[1])]

    def pack(self, image: np.ndarray) -> np.ndarray:
        """Return planes `[..., size]` of images `[..., H, W]`; the padding is zero."""
        planes = np.zeros((*image.shape[:-2], self.size), image.dtype)
        self._image(planes)[...] = image
        return planes

    def unpack(self, planes: np.ndarray) -> np.ndarray:
        """Return the images `[..., H, W]` of planes `[..., size]`."""
        return self._image(planes).copy()

    def inside(self) -> np.ndarray:
        """Float32 `[size]`: 1 at pixels of the image, 0 in the padding."""
        return self.pack(np.ones((self.height, self.width), np.float32))

    def _image(self, planes: np.ndarray) -> np.ndarray:
        rows = planes[..., self.base : self.base + self.height * self.pitch]
        return rows.reshape(*planes.shape[:-1], self.height, self.pitch)[..., : self.width]


def _up(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN
