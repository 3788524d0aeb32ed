"""ResNet-18/50 on video: TSN, TSM, AdaFuse (Meng et al. 2021) and D-STEP (Raviv et al. 2022).

A gated block (x: block input, V: hidden map, K/R: compute/reuse, S: tile mask, all of frame t):

    V_t = relu(bn1(conv1(x_t)))        U_t = S_t (K_t V_t + R_t V_{t-1})        V_{-1} = 0
    Z_t = S_t bn(conv(U_t))            y_t = relu(identity + Z_t)

AdaFuse is the case S = 1. Reuse takes V of the previous frame, not U: history is one frame deep.
Layer names are torchvision's; a bottleneck has its stride in conv2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvexport import gates
from dvexport.models.base import VideoModel
from dvexport.models.config import ResNetConfig
from dvexport.models.networks.classifier import classifier_of_clips
from dvexport.models.networks.policies import BlockGates, ChannelPolicy, Decision, TileMask
from dvexport.models.networks.shift import temporal_shift

__all__ = ["BasicBlock", "Bottleneck", "ResNet"]

_BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
_TILES = (8, 4, 2, 1)
"""Tile edge in output pixels of each stage: at 224 x 224 every mask is 7 x 7."""


def _scaled(channels: int, width: float) -> int:
    """Return `channels` times `width`, a multiple of 8."""
    return max(8, round(channels * width / 8) * 8)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class _Block(nn.Module):
    """What both kinds of residual block share: shift, downsample, gates, the sum."""

    expansion = 1

    def __init__(self, name: str, inputs: int, channels: int, stride: int, config: ResNetConfig) -> None:
        super().__init__()
        self.name, self.stride = name, stride
        outputs = channels * self.expansion
        shift = temporal_shift(config.shift, name, config.shift_div)
        self.block_shift = shift if config.shift_place != "conv1" else nn.Identity()
        self.conv1_shift = shift if config.shift_place == "conv1" else nn.Identity()
        self.shifts_identity = config.shift_place == "in_place"
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.gates: BlockGates | None = None

    @property
    def decision(self) -> Decision | None:
        """What the block's gates decided in the last eager forward pass; None if it has no gates."""
        return self.gates.decision if self.gates is not None else None

    def convs(self) -> list[nn.Conv2d]:
        """Return the convolutions of the residual path."""
        raise NotImplementedError

    def dense(self, x: Tensor) -> Tensor:
        """Return Z with everything computed."""
        raise NotImplementedError

    def gated(self, x: Tensor, action: Tensor | None, tiles: Tensor | None) -> Tensor:
        """Return Z under the decisions."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return y `[N, outputs, H', W']` for x `[N, inputs, H, W]`."""
        shifted = self.block_shift(x)
        identity = shifted if self.shifts_identity else x
        x = shifted
        if self.downsample is not None:
            identity = self.downsample(x)
        hidden_input = self.conv1_shift(x)
        if self.gates is None:
            return F.relu(identity + self.dense(hidden_input))
        action, tiles = self._decide(x)
        return F.relu(identity + self.gated(hidden_input, action, tiles))

    def _decide(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        assert self.gates is not None
        height, width = x.shape[2], x.shape[3]
        action, tiles = self.gates(x, ((height - 1) // self.stride + 1, (width - 1) // self.stride + 1))
        if not torch.compiler.is_exporting():
            sizes, macs = _conv_costs(self.convs(), (height, width))
            self.gates.decision = Decision(self.name, action, tiles, sizes, macs)
        return action, tiles


def _conv_costs(convs: list[nn.Conv2d], size: tuple[int, int]) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Return the output sizes and MACs per frame of convolutions that follow one another."""
    sizes, macs = [], []
    for conv in convs:
        size = ((size[0] - 1) // conv.stride[0] + 1, (size[1] - 1) // conv.stride[1] + 1)
        sizes.append(size)
        macs.append(size[0] * size[1] * conv.weight.numel())
    return tuple(sizes), tuple(macs)


def _promise(action: Tensor | None) -> Tensor | None:
    """Return `[N, C]`, nonzero where a channel may be other than zero; None where nothing is promised."""
    return None if action is None or action.is_floating_point() else action


class BasicBlock(_Block):
    """Two 3x3 convolutions, the gate between them."""

    def __init__(self, name: str, inputs: int, channels: int, stride: int, config: ResNetConfig) -> None:
        super().__init__(name, inputs, channels, stride, config)
        self.conv1, self.bn1 = _conv(inputs, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, channels, 3), nn.BatchNorm2d(channels)

    def convs(self) -> list[nn.Conv2d]:
        """Return the convolutions of the residual path."""
        return [self.conv1, self.conv2]

    def dense(self, x: Tensor) -> Tensor:
        """Return Z with everything computed."""
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def gated(self, x: Tensor, action: Tensor | None, tiles: Tensor | None) -> Tensor:
        """Return Z under the decisions."""
        assert self.gates is not None
        u = gates.gated_conv(x, self.conv1, self.bn1, gate=self.name, activation="relu",
                             action=action, tiles=self.gates.hidden_tiles(tiles))  # fmt: skip
        return gates.gated_conv(u, self.conv2, self.bn2, gate=self.name, tiles=tiles,
                                active_in=_promise(action))  # fmt: skip


class Bottleneck(_Block):
    """1x1, 3x3 (stride), 1x1 convolutions, the channel gate on the first.

    D-STEP's Bottleneck was never released. The tile mask gates all three: what conv2 gives outside
    the active tiles reaches, through the 1x1 conv3, only pixels that are masked anyway.
    """

    expansion = 4

    def __init__(self, name: str, inputs: int, channels: int, stride: int, config: ResNetConfig) -> None:
        super().__init__(name, inputs, channels, stride, config)
        outputs = channels * self.expansion
        self.conv1, self.bn1 = _conv(inputs, channels, 1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = _conv(channels, outputs, 1), nn.BatchNorm2d(outputs)

    def convs(self) -> list[nn.Conv2d]:
        """Return the convolutions of the residual path."""
        return [self.conv1, self.conv2, self.conv3]

    def dense(self, x: Tensor) -> Tensor:
        """Return Z with everything computed."""
        u = F.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(F.relu(self.bn2(self.conv2(u)))))

    def gated(self, x: Tensor, action: Tensor | None, tiles: Tensor | None) -> Tensor:
        """Return Z under the decisions."""
        assert self.gates is not None
        u = gates.gated_conv(x, self.conv1, self.bn1, gate=self.name, activation="relu",
                             action=action, tiles=self.gates.hidden_tiles(tiles))  # fmt: skip
        u = gates.gated_conv(u, self.conv2, self.bn2, gate=self.name, activation="relu",
                             tiles=tiles, active_in=_promise(action))  # fmt: skip
        if tiles is None:
            return self.bn3(self.conv3(u))
        return gates.gated_conv(u, self.conv3, self.bn3, gate=self.name, tiles=tiles)


class ResNet(VideoModel):
    """TSN, TSM, AdaFuse or D-STEP on ResNet-18 or ResNet-50, as `config` says.

    Args:
        config: every option; see `ResNetConfig`.
        name: how the zoo calls it.
    """

    config: ResNetConfig

    def __init__(self, config: ResNetConfig, name: str = "resnet") -> None:
        super().__init__(**classifier_of_clips(config, name))
        stem = _scaled(64, config.width)
        self.conv1, self.bn1 = nn.Conv2d(3, stem, 7, 2, padding=3, bias=False), nn.BatchNorm2d(stem)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        block = BasicBlock if config.depth == 18 else Bottleneck
        inputs = stem
        for stage, count in enumerate(_BLOCKS[config.depth]):
            channels = _scaled(64 * 2**stage, config.width)
            blocks = []
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(block(f"layer{stage + 1}.{i}", inputs, channels, stride, config))
                inputs = channels * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(inputs, config.classes)
        self._init_dense()
        self._add_gates()

    def _init_dense(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.fc.weight, 0, 0.001)
        nn.init.zeros_(self.fc.bias)

    def _add_gates(self) -> None:
        """Give the blocks of the enabled stages their policies and masks."""
        shared: dict[tuple[int, int], tuple[nn.Linear, nn.Linear]] = {}
        for stage in sorted(set(self.config.enabled_stages)):
            for block in self.get_submodule(f"layer{stage + 1}"):  # type: ignore[attr-defined]
                policy = self._policy(block, shared) if self.config.channel_gates else None
                mask = None
                if self.config.tile_gates:
                    mask = TileMask(block.conv1.in_channels, _TILES[stage], self.config.tau)
                if policy is not None or mask is not None:
                    block.gates = BlockGates(block.name, policy, mask, self.config)

    def _policy(
        self, block: BasicBlock | Bottleneck, shared: dict[tuple[int, int], tuple[nn.Linear, nn.Linear]]
    ) -> ChannelPolicy:
        shape = (block.conv1.in_channels, block.conv1.out_channels)
        if not self.config.shared_policies or shape not in shared:
            shared[shape] = ChannelPolicy.linears(*shape, self.config)
        return ChannelPolicy(block.name, *shared[shape], self.config)

    def gated_blocks(self) -> list[BasicBlock | Bottleneck]:
        """Return the blocks with gates, in order; their `decision` tells what they decided last."""
        return [m for m in self.modules() if isinstance(m, (BasicBlock, Bottleneck)) and m.gates is not None]

    def decisions(self) -> list[Decision]:
        """Return what each gated block decided in the last eager forward pass."""
        return [block.decision for block in self.gated_blocks() if block.decision is not None]

    def seed_sampling(self, seed: int) -> None:
        """Make the draws of training and of `sampling=official` repeatable, whatever else draws."""
        device = self.fc.weight.device
        generator = torch.Generator(device=device).manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (ChannelPolicy, TileMask)):
                module.generator = generator

    def per_frame_logits(self, x: Tensor) -> Tensor:
        """Return logits `[N, classes]` of each frame of `x` `[N, 3, H, W]`, before consensus."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(self.dropout(x.mean((2, 3))))
