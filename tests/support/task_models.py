"""Two models that are no classifiers, as ordinary modules: a segmenter, and a detector with two streams of input."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvexport import gates
from dvexport.models.base import imagenet_preprocess
from dvexport.ports import Output

__all__ = ["CLIP", "DETECTOR", "FLOW", "LABELS", "SEGMENTER", "SIZE", "Detector", "Segmenter", "detector", "segmenter"]

SIZE, CLIP = (48, 64), 3
"""Height and width of a frame, and frames of a clip."""
FLOW = (2, 24, 32)
LABELS = ["nothing", "hand", "cup"]
_PREPROCESS = imagenet_preprocess(SIZE, CLIP)


def _block(inputs: int, outputs: int, **options) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **options), nn.BatchNorm2d(outputs)


class Segmenter(nn.Module):
    """Maps of three classes; tile gates in the encoder and the decoder, upsampling and concatenation between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.look = nn.Conv2d(8, 1, 3, padding=1)
        self.down, self.down_bn = _block(8, 16, stride=2)
        self.deep, self.deep_bn = _block(16, 16)
        self.up, self.up_bn = _block(24, 8)
        self.head = nn.Conv2d(8, len(LABELS), 1)

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        fine = F.relu(self.stem(frames))
        tiles = self.look(F.avg_pool2d(fine, 4)).squeeze(1) >= 0
        coarse = F.relu(self.down_bn(self.down(fine)))
        coarse = gates.gated_conv(coarse, self.deep, self.deep_bn, gate="encoder", activation="relu", tiles=tiles)
        wide = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        both = torch.cat([fine, wide], 1)
        near = gates.gated_conv(both, self.up, self.up_bn, gate="decoder", activation="relu", tiles=tiles)
        masks = F.interpolate(self.head(near), scale_factor=2, mode="nearest")
        return {"masks": masks, "features": coarse.mean((2, 3))}


class Detector(nn.Module):
    """Boxes and scores at each place of a coarse grid, from frames and optical flow, which meet in a gated layer."""

    def __init__(self) -> None:
        super().__init__()
        self.see, self.move = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(2, 8, 3, padding=1)
        self.look = nn.Conv2d(16, 1, 1)
        self.mix, self.mix_bn = _block(16, 16)
        self.policy = nn.Linear(16, 3 * 16)
        self.head = nn.Conv2d(16, 4 + len(LABELS), 1)

    def forward(self, frames: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([F.relu(self.see(frames)), F.relu(self.move(flow))], 1)
        tiles = self.look(F.avg_pool2d(both, 8)).squeeze(1) >= 0
        action = self.policy(gates.delay(both.mean((2, 3)), name="before")).reshape(-1, 16, 3).argmax(2)
        mixed = gates.gated_conv(both, self.mix, self.mix_bn, gate="mix", activation="relu", tiles=tiles, action=action)
        found = self.head(F.avg_pool2d(mixed, 8)).flatten(2).transpose(1, 2)
        return 64 * found[..., :4].sigmoid(), found[..., 4:].sigmoid()


SEGMENTER = {
    "example": torch.zeros(2, 3, *SIZE),
    "preprocess": _PREPROCESS,
    "outputs": [Output("masks", "map", tuple(LABELS))],
}
DETECTOR = {
    "example": {"frames": torch.zeros(2, 3, *SIZE), "flow": torch.zeros(2, *FLOW)},
    "preprocess": _PREPROCESS,
    "outputs": [Output("boxes", "boxes"), Output("scores", "scores", tuple(LABELS))],
}


def _lively(model: nn.Module) -> nn.Module:
    """Give norms statistics, and decisions a bias to either side."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


@functools.cache
def segmenter() -> Segmenter:
    """A segmenter with weights that are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return _lively(Segmenter())  # type: ignore[return-value]


@functools.cache
def detector() -> Detector:
    """A detector with weights that are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return _lively(Detector())  # type: ignore[return-value]


def clip_feeds(*, flow: bool, frames: int = CLIP, seed: int = 5) -> dict[str, np.ndarray]:
    """Noise by the names of the inputs, frames first."""
    rng = np.random.default_rng(seed)
    feeds = {"frames": rng.standard_normal((frames, 3, *SIZE), dtype=np.float32)}
    return feeds | ({"flow": rng.standard_normal((frames, *FLOW), dtype=np.float32)} if flow else {})
