"""Procedural textures and shapes, the same for the same keys on every platform and device.

Everything random comes from an integer hash of (key, stream, element), never from a random
generator, so an image depends on nothing but its key. Images are float32 in [0, 1].
"""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Draws", "noise", "painted", "square_grid", "star_distance"]

_WORD = 0xFFFFFFFF
_MULTIPLIER = 0x45D9F3B  # below 2^31: the product with a 32-bit word never leaves int64


def _mix(x: Tensor) -> Tensor:
    """Hash 32-bit words held in int64, bijectively (xor, shift, multiply)."""
    x = ((x ^ (x >> 16)) * _MULTIPLIER) & _WORD
    x = ((x ^ (x >> 16)) * _MULTIPLIER) & _WORD
    return x ^ (x >> 16)


class Draws:
    """Named uniform draws of a batch of keys: `draws("speed", 2, low=-1, high=1)` gives `[B, 2]`.

    Args:
        seed: the seed of the whole data set.
        keys: int64 `[B]`, one per image or clip.
    """

    def __init__(self, seed: int, keys: Tensor) -> None:
        self.keys = _mix(_mix(keys & _WORD) ^ _mix(torch.tensor(seed & _WORD, device=keys.device)))

    def __call__(self, stream: str, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return float32 `[B, *shape]`, uniform in [low, high) and independent of other streams."""
        count = int(torch.Size(shape).numel())
        element = torch.arange(count, device=self.keys.device)
        key = _mix(self.keys ^ zlib.crc32(stream.encode()))
        words = _mix(key[:, None] ^ _mix(element + 0x9E3779B9 & _WORD))
        unit = words.double() / 2**32
        return (low + (high - low) * unit).float().reshape(len(self.keys), *shape)

    def to(self, device: torch.device | str) -> Draws:
        """Return the same draws made on `device`."""
        moved = object.__new__(Draws)
        moved.keys = self.keys.to(device)
        return moved


def square_grid(side: int, extent: float, device: torch.device | str) -> Tensor:
    """Return `[side, side, 2]`: the (x, y) of the pixel centres of [-extent, extent]^2, y down."""
    axis = ((torch.arange(side, device=device) + 0.5) / side * 2 - 1) * extent
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], dim=-1)


def noise(draws: Draws, stream: str, *, channels: int, side: int, octaves: tuple[int, ...]) -> Tensor:
    """Return fractal noise `[B, channels, side, side]` around 0.5: lattices of hashed values, bicubic.

    Args:
        draws, stream: where the randomness comes from.
        channels, side: the sizes of the result.
        octaves: cells per side of each lattice; amplitude falls as (cells of the first / cells)^0.7.
    """
    total = torch.zeros(len(draws.keys), channels, side, side, device=draws.keys.device)
    weight = 0.0
    for cells in octaves:
        lattice = draws(f"{stream}.{cells}", channels, cells + 1, cells + 1, low=-1, high=1)
        amplitude = (octaves[0] / cells) ** 0.7
        total += amplitude * F.interpolate(lattice, (side, side), mode="bicubic", align_corners=True)
        weight += amplitude
    return (0.5 + 0.9 * total / weight).clamp(0, 1)


def painted(draws: Draws, stream: str, *, side: int, octaves: tuple[int, ...], chroma: float) -> Tensor:
    """Return a coloured texture `[B, 3, side, side]`: noise and warped stripes through three colours."""
    device = draws.keys.device
    field = noise(draws, stream, channels=3, side=side, octaves=octaves)
    unit = square_grid(side, 1.0, device)
    turn = draws(f"{stream}.stripe.turn", 1, 1, high=2 * torch.pi)
    along = unit[..., 0] * torch.cos(turn) + unit[..., 1] * torch.sin(turn)
    frequency = draws(f"{stream}.stripe.frequency", 1, 1, low=6, high=22)
    stripes = 0.5 + 0.5 * torch.sin(frequency * along + 9 * field[:, 2])
    share = draws(f"{stream}.stripe.share", 1, 1, low=-0.4, high=0.7).clamp(min=0)
    blend = (field[:, 0] * (1 - share) + stripes * share)[:, None]
    lightness = draws(f"{stream}.lightness", 3, 1, low=0.12, high=0.88)
    base, second, third = (lightness + draws(f"{stream}.tint", 3, 3, low=-chroma, high=chroma)).unbind(1)
    colour = torch.lerp(base[..., None, None], second[..., None, None], blend)
    accent = ((field[:, 1:2] - 0.5) * 2.5).clamp(0, 1)
    return torch.lerp(colour, third[..., None, None], accent).clamp(0, 1)


def star_distance(draws: Draws, stream: str, points: Tensor) -> Tensor:
    """Return how far inside a random star-shaped outline of radius about 1 each point lies.

    Args:
        draws, stream: the outline: an elongated blob with up to six lobes.
        points: `[h, w, 2]` in the shape's own coordinates.

    Returns:
        `[B, h, w]`, positive inside.
    """
    stretch = draws(f"{stream}.stretch", 1, 1, low=0.55, high=0.8)
    x, y = points[..., 0], points[..., 1] / stretch
    angle = torch.atan2(y, x)
    radius = torch.ones_like(angle)
    phases = draws(f"{stream}.phase", 6, 1, 1, high=2 * torch.pi)
    sizes = draws(f"{stream}.lobe", 6, 1, 1, low=-0.2, high=0.2)
    for lobe in range(6):
        radius = radius + sizes[:, lobe] / (1 + 0.35 * lobe) * torch.cos((lobe + 1) * angle + phases[:, lobe])
    return 0.9 * radius - torch.sqrt(x * x + y * y)
