"""What a model's training did to a video, as plain data: it travels in every bundle.

No torch and no numpy here, so that reading a bundle's manifest stays cheap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from dvexport.errors import UsageError
from dvexport.video.limits import FRAME_RATE, MAX_CLIP_PIXELS, MAX_FRAMES, MAX_SIDE, MAX_STRIDE, MAX_VIEWS, MEAN, STD

__all__ = ["COLOUR_ORDERS", "CROPS", "MAX_SIDE", "RECIPES", "SAMPLINGS", "Preprocess"]

COLOUR_ORDERS = ("RGB", "BGR")
SAMPLINGS = ("uniform", "dense", "dense_to_ends")
CROPS = (1, 3)
RECIPES: dict[str, dict[str, Any]] = {
    "videomae": {"sampling": "dense_to_ends", "stride": 4, "clips": 5, "crops": 3},
    "video_swin": {"sampling": "dense", "stride": 2, "clips": 4, "crops": 3},
}
"""How the official code tests its models on Kinetics-400; the short side is resized to the crop's."""


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
            deterministic test-time sampling of TSN (Wang et al. 2016). `dense`: frames `stride` apart,
            in the middle of each of `clips` parts, a short video repeated (Video-Swin's recipe: 32 frames,
            stride 2, 4 clips, 3 crops). `dense_to_ends`: the same, the first clip at the start and the last
            at the end, a short video's last frame repeated (VideoMAE's on Kinetics: 16 frames, stride 4,
            5 clips, 3 crops).
        frame_rate: frames a second in stream mode; None takes every frame of the video.
        stride: frames of the video from one frame of a dense clip to the next.
        clips: clips taken from a video, whose probabilities are averaged.
        crops: 1 is the centre crop, 3 are both ends of the long side and the centre; averaged as clips are.
    """

    size: tuple[int, int] = (224, 224)
    resize: int = 256
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    colour_order: str = "RGB"
    frames: int = 8
    sampling: str = "uniform"
    frame_rate: float | None = None
    stride: int = 1
    clips: int = 1
    crops: int = 1

    def __post_init__(self) -> None:
        self._check_types()
        _require(min(self.size) > 0, "size", "must be positive")
        _require(max(*self.size, self.resize) <= MAX_SIDE, "size", f"has a side of more than {MAX_SIDE} pixels")
        _require(self.resize >= min(self.size), "resize", f"is smaller than the crop {self.size}")
        _require(all(MEAN[0] <= value <= MEAN[1] for value in self.mean), "mean", f"is not from {MEAN[0]} to {MEAN[1]}")
        _require(all(STD[0] <= value <= STD[1] for value in self.std), "std", f"is not from {STD[0]} to {STD[1]}")
        _require(self.colour_order in COLOUR_ORDERS, "colour_order", f"is none of {COLOUR_ORDERS}")
        _require(0 < self.frames <= MAX_FRAMES, "frames", f"is not from 1 to {MAX_FRAMES}")
        _require(self.sampling in SAMPLINGS, "sampling", f"is none of {SAMPLINGS}")
        rate = self.frame_rate
        _require(rate is None or FRAME_RATE[0] <= rate <= FRAME_RATE[1], "frame_rate",
                 f"is not from {FRAME_RATE[0]} to {FRAME_RATE[1]} frames a second")  # fmt: skip
        self._check_views()

    def _check_views(self) -> None:
        dense = self.sampling != "uniform"
        _require(0 < self.stride <= (MAX_STRIDE if dense else 1), "stride",
                 f"is not from 1 to {MAX_STRIDE}, and only dense sampling has one above 1")  # fmt: skip
        _require(self.crops in CROPS, "crops", f"is none of {CROPS}")
        _require(0 < self.clips * self.crops <= MAX_VIEWS, "clips", f"times crops is not from 1 to {MAX_VIEWS}")
        pixels = self.size[0] * self.size[1] * self.frames * self.clips * self.crops
        _require(pixels <= MAX_CLIP_PIXELS, "frames", f"asks for {pixels} pixels in all, more than {MAX_CLIP_PIXELS}")
        _require(dense or self.clips == 1, "clips", "can be more than 1 with dense sampling only")

    def _check_types(self) -> None:
        for name, length, kinds in (("size", 2, int), ("mean", 3, (int, float)), ("std", 3, (int, float))):
            values = getattr(self, name)
            _require(isinstance(values, list | tuple) and len(values) == length, name, f"needs {length} values")
            _require(all(_is(value, kinds) for value in values), name, "needs numbers")
            object.__setattr__(self, name, tuple(values))
        for name in ("resize", "frames", "stride", "clips", "crops"):
            _require(_is(getattr(self, name), int), name, "needs a whole number")
        _require(self.frame_rate is None or _is(self.frame_rate, (int, float)), "frame_rate", "needs a number")

    def with_recipe(self, name: str) -> Preprocess:
        """Return the same with the sampling of one of `RECIPES`."""
        return replace(self, resize=min(self.size), **RECIPES[name])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values; those of dense sampling only where they are used."""
        unused = {
            field.name for field in fields(self) if field.name in _LATER and getattr(self, field.name) == field.default
        }
        values = {k: v for k, v in asdict(self).items() if k not in unused}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

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


_LATER = ("stride", "clips", "crops")
"""Fields that older manifests lack: left out at their defaults, so that older readers take the manifest."""


def _is(value: object, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _require(holds: bool, key: str, why: str) -> None:
    if not holds:
        raise UsageError("the preprocessing is not usable", where=key, why=f"it {why}")
