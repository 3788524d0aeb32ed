"""MobileNetV2 as TSM: the model of the official online demo, and its offline sibling.

The shift feeds the first 1x1 convolution of every inverted residual block that has a skip
connection and expands its input (ten blocks at the standard setting); the skip is unshifted.
Layer names are those of the official checkpoints.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from dvexport.models.base import VideoModel
from dvexport.models.config import MobileNetConfig
from dvexport.models.networks.classifier import classifier_of_clips
from dvexport.models.networks.shift import temporal_shift

__all__ = ["InvertedResidual", "MobileNetV2"]

_STEM, _HEAD = 32, 1280
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks, stride of the first block (Sandler et al. 2018, table 2)."""


def _divisible(channels: float) -> int:
    """Round up to a multiple of 8, as the official code does (the paper rounds to the nearest)."""
    return math.ceil(channels / 8) * 8


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    """Expand (1x1), depthwise 3x3, project (1x1); shifted if it expands and has a skip connection."""

    def __init__(self, name: str, inputs: int, outputs: int, stride: int, expand: int, config: MobileNetConfig) -> None:
        super().__init__()
        hidden = inputs * expand
        self.residual = stride == 1 and inputs == outputs
        self.shift: nn.Module = nn.Identity()
        if self.residual and expand > 1:
            self.shift = temporal_shift(config.shift, name, config.shift_div)
        layers = [*_conv_bn(inputs, hidden, 1), nn.ReLU6()] if expand > 1 else []
        layers += [*_conv_bn(hidden, hidden, 3, stride, hidden), nn.ReLU6(), *_conv_bn(hidden, outputs, 1)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[N, outputs, H', W']` for `[N, inputs, H, W]`."""
        y = self.conv(self.shift(x))
        return x + y if self.residual else y


class MobileNetV2(VideoModel):
    """MobileNetV2 per frame (TSN), with offline or with online temporal shift.

    Args:
        config: every option; see `MobileNetConfig`.
        name: how the zoo calls it.
    """

    config: MobileNetConfig

    def __init__(self, config: MobileNetConfig, name: str = "mobilenetv2") -> None:
        super().__init__(**classifier_of_clips(config, name))
        features: list[nn.Module] = [nn.Sequential(*_conv_bn(3, _STEM, 3, 2), nn.ReLU6())]
        inputs = _STEM
        for expand, channels, count, first_stride in _STAGES:
            outputs = _divisible(channels * config.width) if expand > 1 else channels
            for i in range(count):
                block_name = f"features.{len(features)}"
                stride = first_stride if i == 0 else 1
                features.append(InvertedResidual(block_name, inputs, outputs, stride, expand, config))
                inputs = outputs
        head = _divisible(_HEAD * config.width) if config.width > 1 else _HEAD
        features.append(nn.Sequential(*_conv_bn(inputs, head, 1), nn.ReLU6()))
        self.features = nn.Sequential(*features)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(head, config.classes)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def per_frame_logits(self, x: Tensor) -> Tensor:
        """Return logits `[N, classes]` of each frame of `x` `[N, 3, H, W]`, before consensus."""
        return self.classifier(self.dropout(self.features(x).mean((2, 3))))
