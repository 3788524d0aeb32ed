"""Layers that don't mix frames stream, however they are written; exported with the comparisons that an export makes."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dvexport.errors import TraceError, UsageError
from dvexport.export import export
from dvexport.models.base import imagenet_preprocess

SIZE, FRAMES = 16, 3


class Layer(nn.Module):
    """A layer of a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Net(nn.Module):
    """A convolution, a layer, and a number for each channel."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.layer = nn.Conv2d(3, 8, 3, 2, 1), layer

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.layer(F.relu(self.conv(frames))).flatten(2).abs().mean(2)


def attend(x: torch.Tensor) -> torch.Tensor:
    q = x.flatten(2).transpose(1, 2)
    return ((q @ q.transpose(1, 2) / 9).softmax(-1) @ q).transpose(1, 2)


APART = {
    "group norm": nn.GroupNorm(4, 8),
    "instance norm": nn.InstanceNorm2d(8, affine=True),
    "layer norm": nn.LayerNorm([8, 8, 8]),
    "local response norm": nn.LocalResponseNorm(3),
    "a grid that does not divide": nn.AdaptiveAvgPool2d(3),
    "a grid that divides": nn.AdaptiveAvgPool2d(4),
    "nearest, exact": nn.Upsample(scale_factor=2, mode="nearest-exact"),
    "bilinear": nn.Upsample(scale_factor=1.5, mode="bilinear"),
    "bicubic": nn.Upsample(size=(5, 7), mode="bicubic"),
    "channel shuffle": nn.ChannelShuffle(4),
    "pixel shuffle": Layer(lambda x: F.pixel_shuffle(x, 2)),
    "softmax over pixels": Layer(lambda x: x.flatten(2).softmax(2)),
    "running sum over rows": Layer(lambda x: x.cumsum(2)),
    "rolled over columns": Layer(lambda x: torch.roll(x, 1, 3)),
    "attention in a frame": Layer(attend),
    "frames moved to the end": Layer(lambda x: x.permute(1, 2, 3, 0).mul(2).permute(3, 0, 1, 2)),
    "sums over pixels first": Layer(lambda x: x.permute(2, 3, 0, 1).mean((0, 1))[:, :, None, None]),
}


def exported(layer: nn.Module, path, backend: str, mode: str | None = "stream", **told):
    return export(
        Net(layer).eval(), example=torch.zeros(FRAMES, 3, SIZE, SIZE), outputs=["features"], backend=backend,
        preprocess=imagenet_preprocess((SIZE, SIZE), frames=FRAMES), mode=mode, output=path, **told,
    )  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_layers_that_keep_frames_apart_stream(name, tmp_path):
    assert exported(APART[name], tmp_path / "x.dvx", "onnx").manifest.mode == "stream"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["group norm", "a grid that does not divide", "nearest, exact", "attention in a frame"]
)
def test_natively_too(name, tmp_path):
    assert exported(APART[name], tmp_path / "x.dvx", "tvm").manifest.mode == "stream"


@pytest.mark.parametrize(
    ("layer", "node"),
    [
        (Layer(lambda x: x - x.mean(0, keepdim=True)), "ReduceMean"),
        (Layer(lambda x: x.softmax(0)), "Softmax"),
        (Layer(lambda x: x.flip(0)), "Slice"),
        (Layer(lambda x: x.permute(1, 0, 2, 3).cumsum(1).permute(1, 0, 2, 3)), "CumSum"),
        (Layer(lambda x: x.permute(1, 2, 3, 0).softmax(-1).permute(3, 0, 1, 2)), "Softmax"),
    ],
)
def test_layers_that_mix_frames_are_refused_by_name(layer, node, tmp_path):
    with pytest.raises(TraceError, match="can't run in stream mode") as caught:
        exported(layer, tmp_path / "x.dvx", "onnx")
    assert node in caught.value.where


def test_a_model_that_is_not_causal_is_a_clip_before_the_trace(tmp_path, monkeypatch):
    mean = Layer(lambda x: x - x.mean(0, keepdim=True))
    assert exported(mean, tmp_path / "x.dvx", "onnx", mode=None, causal=False).manifest.mode == "clip"
    monkeypatch.setattr(sys.modules["dvexport.export"], "trace", lambda *_: pytest.fail("it was traced"))
    with pytest.raises(UsageError, match="can't be exported in stream mode") as caught:
        exported(mean, tmp_path / "y.dvx", "onnx", causal=False)
    assert caught.value.why == "a frame's result depends on later frames"
