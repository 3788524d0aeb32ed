"""What a model's training did to a video, as plain data: it travels in every bundle.

No torch and no numpy here, so that reading a bundle's manifest stays cheap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dvexport.errors import UsageError

__all__ = ["COLOUR_ORDERS", "MAX_SIDE", "SAMPLINGS", "Preprocess"]

COLOUR_ORDERS = ("RGB", "BGR")
SAMPLINGS = ("uniform",)
MAX_SIDE = 1 << 14
"""The longest side of a frame, in pixels: a bundle that says more asks for all memory."""


@dataclass(frozen=True)
class Preprocess:
    """How frames are taken from a video and normalised; by default ImageNet's statistics at 224.

    Attributes:
        size: (height, width) of the centre crop the model sees, in pixels.
        resize: length the short side is resized to before the crop, in pixels; a frame that would
            then be smaller than the crop is enlarged until it covers it.
        mean: per-channel mean in the 0..1 range, in the order of `colour_order`.
        std: per-channel standard deviation in the 0..1 range, in the order of `colour_order`.
        colour_order: `RGB` or `BGR`.
        frames: frames per clip in clip mode.
        sampling: `uniform`: the centre frame of each of `frames` equal segments, which is the
            deterministic test-time sampling of TSN (Wang et al. 2016).
        frame_rate: frames a second in stream mode; None takes every frame of the video.
    """

    size: tuple[int, int] = (224, 224)
    resize: int = 256
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    colour_order: str = "RGB"
    frames: int = 8
    sampling: str = "uniform"
    frame_rate: float | None = None

    def __post_init__(self) -> None:
        self._check_types()
        _require(min(self.size) > 0, "size", "must be positive")
        _require(max(*self.size, self.resize) <= MAX_SIDE, "size", f"has a side of more than {MAX_SIDE} pixels")
        _require(self.resize >= min(self.size), "resize", f"is smaller than the crop {self.size}")
        _require(min(self.std) > 0, "std", "must be positive")
        _require(self.colour_order in COLOUR_ORDERS, "colour_order", f"is none of {COLOUR_ORDERS}")
        _require(self.frames > 0, "frames", "must be positive")
        _require(self.sampling in SAMPLINGS, "sampling", f"is none of {SAMPLINGS}")
        _require(self.frame_rate is None or self.frame_rate > 0, "frame_rate", "must be positive")

    def _check_types(self) -> None:
        for name, length, kinds in (("size", 2, int), ("mean", 3, (int, float)), ("std", 3, (int, float))):
            values = getattr(self, name)
            _require(isinstance(values, list | tuple) and len(values) == length, name, f"needs {length} values")
            _require(all(isinstance(value, kinds) for value in values), name, "needs numbers")
            object.__setattr__(self, name, tuple(values))
        for name in ("resize", "frames"):
            _require(isinstance(getattr(self, name), int), name, "needs a whole number")
        _require(isinstance(self.frame_rate, int | float | None), "frame_rate", "needs a number")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocess:
        """Return the preprocessing that `to_dict` gave; raises UsageError for a wrong key or value."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        _require(not unknown, ", ".join(unknown), "is no key of it")
        try:
            return cls(**data)
        except TypeError as error:
            raise UsageError("the preprocessing is not usable", why=str(error)) from error


def _require(holds: bool, key: str, why: str) -> None:
    if not holds:
        raise UsageError("the preprocessing is not usable", where=key, why=f"it {why}")
