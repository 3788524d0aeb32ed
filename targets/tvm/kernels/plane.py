"""How a plane lies in memory: rows that share their zero padding, so that a tap is a constant offset.

A tensor `[C, H, W]` is held as C planes of `Plane.size` elements. Pixel (y, x) of a plane is at
`base + y * pitch + x`. What is outside the image is zero, always: the columns between two rows (the right pad
of one and the left pad of the next), and rows above and below. A window that reaches over the edge reads zeros
without any test, and neighbouring elements are one vector whatever the width of the image is.

An image has any number of spatial axes, depth first: a clip `[C, D, H, W]` is C planes of D slices, and slices share
their rows of padding as rows share their columns. An image of two axes is one with a depth of 1, without that axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from dvexport.errors import UsageError
from dvexport.targets.tvm.machine.dtype import F32, DType

__all__ = ["MOST_STEP", "Plane", "Spatial", "require_two_axes"]

MOST_STEP = 2
"""Columns from one output pixel's window to the next, at most, that kernels over planes read as vectors."""

_TILE = 4
"""Pixels that a tile of outputs may overshoot the image by, and one more: Winograd's are the largest."""

_OVERSHOOT = 2
"""Cache lines after a plane's last row that vectors may read or write."""


class Spatial(Protocol):
    """What has spatial axes: a plane, a window."""

    @property
    def rank(self) -> int:
        """How many there are."""


@dataclass(frozen=True)
class Plane:
    """The layout of one channel.

    Attributes:
        shape: the size of the image in pixels, depth first: `(height, width)` or `(depth, height, width)`.
        pad: zero pixels that windows may reach beyond each edge.
        dtype: the type of a pixel.
    """

    shape: tuple[int, ...]
    pad: int = 1
    dtype: DType = F32

    def __post_init__(self) -> None:
        """Refuse an image without rows."""
        if len(self.shape) < 2 or min(self.shape) < 1:
            raise ValueError(f"a plane of {self.shape} pixels has no rows and columns")

    @property
    def rank(self) -> int:
        """Spatial axes."""
        return len(self.shape)

    @property
    def height(self) -> int:
        """Rows of a slice."""
        return self.shape[-2]

    @property
    def width(self) -> int:
        """Pixels of a row."""
        return self.shape[-1]

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Elements from one pixel to the next along each axis; there is room for tiles of 4 to overshoot."""
        strides = [1]
        for size in reversed(self.shape[1:]):
            strides.insert(0, strides[0] * max(size + self.pad, _up(size, _TILE)))
        return tuple(strides)

    @property
    def pitch(self) -> int:
        """Elements from one row to the next."""
        return self.strides[-2]

    @cached_property
    def base(self) -> int:
        """Offset of the first pixel: the padding before it, rounded up to a cache line."""
        return _up(self.pad * sum(self.strides), self.dtype.line)

    @cached_property
    def size(self) -> int:
        """Elements of a plane: the padding before and after, and a vector's overshoot at the end."""
        outer = zip(self.shape[:-2], self.strides[:-2], strict=True)
        slices = sum((size - 1 + self.pad) * stride for size, stride in outer)
        below = max(self.pad, 1) + (-self.height % _TILE) + 1
        rows = (self.height + below) * self.pitch
        return _up(self.base + slices + rows + _OVERSHOOT * self.dtype.line, self.dtype.line)

    @property
    def bytes(self) -> int:
        """Bytes of a plane."""
        return self.dtype.size(self.size)

    def offset(self, *pixel: int) -> int:
        """Offset of a pixel, an index for each axis; it may lie in the padding."""
        return self.base + sum(index * stride for index, stride in zip(pixel, self.strides, strict=True))

    def taps(self, kernel: Sequence[int], dilation: Sequence[int] = ()) -> list[int]:
        """Offsets of a window's pixels from its first one, the last axis fastest."""
        apart = [by * stride for by, stride in zip(dilation or [1] * self.rank, self.strides, strict=True)]
        steps = ([index * step for index in range(size)] for size, step in zip(kernel, apart, strict=True))
        return [sum(each) for each in itertools.product(*steps)]

    def pack(self, image: np.ndarray) -> np.ndarray:
        """Return planes `[..., size]` of images `[..., *shape]`; the padding is zero."""
        planes = np.zeros((*image.shape[: -self.rank], self.size), image.dtype)
        self._image(planes)[...] = image
        return planes

    def unpack(self, planes: np.ndarray) -> np.ndarray:
        """Return the images `[..., *shape]` of planes `[..., size]`."""
        return self._image(planes).copy()

    def inside(self) -> np.ndarray:
        """`[size]` of `dtype`: 1 at pixels of the image, 0 in the padding."""
        return self.pack(np.ones(self.shape, self.dtype.array))

    def _image(self, planes: np.ndarray) -> np.ndarray:
        """Return a view of the images."""
        image = planes[..., self.base :]
        steps = (stride * planes.strides[-1] for stride in self.strides)
        return np.lib.stride_tricks.as_strided(image, (*planes.shape[:-1], *self.shape), (*planes.strides[:-1], *steps))


def require_two_axes(kernel: str, *given: Spatial) -> None:
    """Refuse planes and windows that a kernel over rows and columns has no code for.

    Raises:
        UsageError: one of them has another number of spatial axes.
    """
    for each in given:
        if each.rank != 2:
            raise UsageError(f"{kernel} takes two spatial axes, not {each.rank}", where=str(each))


def _up(count: int, by: int) -> int:
    return -(-count // by) * by
