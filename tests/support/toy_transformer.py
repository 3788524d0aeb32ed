"""A small video transformer that chooses tokens, for tests: STA's shape with simple scores."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dvexport import gates
from dvexport.models.base import VideoModel, imagenet_preprocess

__all__ = ["Toy", "ToyConfig", "toy"]


@dataclass(frozen=True)
class ToyConfig:
    """`drop`: tokens that each of the two groups loses after each of the first two blocks."""

    classes: int = 5
    frames: int = 4
    size: tuple[int, int] = (48, 64)
    patch: int = 16
    width: int = 32
    heads: int = 2
    depth: int = 3
    drop: int = 3


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(dim=-1)
        x = x + self.proj((attention @ v).transpose(1, 2).reshape(b, n, c))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


@dataclass(frozen=True)
class ToyStage:
    """A place where both groups lose tokens."""

    call: int
    groups: int = 2

    def gate(self, group: int) -> str:
        """Return the name of a group's decision."""
        return f"sta.{self.call}.{group}"


class Toy(VideoModel):
    """Patches of frame pairs, blocks, two groups of tokens that each lose `drop` after blocks 0 and 1."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(
            name="toy",
            config=config,
            preprocess=imagenet_preprocess(config.size, config.frames),
            labels=[f"class {i}" for i in range(config.classes)],
            causal=False,
            whole_clip=True,
        )
        patch = (2, config.patch, config.patch)
        self.embed = nn.Conv3d(3, config.width, patch, stride=patch)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, config.classes)
        self.drop = config.drop
        self.token_grid = (config.frames // 2, *(side // config.patch for side in config.size))
        self.token_groups = [ToyStage(0), ToyStage(1)] if config.drop else []

    def forward(self, frames: Tensor) -> Tensor:
        clips = frames.reshape(-1, self.preprocess.frames, *frames.shape[1:]).permute(0, 2, 1, 3, 4)
        x = self.embed(clips).flatten(2).transpose(1, 2)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.drop and i < 2:
                x = self._pruned(x, i)
        return self.head(self.norm(x.mean(dim=1)))

    def _pruned(self, x: Tensor, call: int) -> Tensor:
        groups = x.chunk(2, dim=1)
        kept = []
        for g, group in enumerate(groups):
            score = (group @ self.blocks[call].fc1.weight.T).abs().sum(dim=2)  # a product only decisions need
            kept.append(gates.select_tokens(group, score, group.shape[1] - self.drop, gate=f"sta.{call}.{g}")[0])
        return torch.cat(kept, dim=1)

    def without_pruning(self) -> Toy:
        """Return the dense model over the same parameters."""
        dense = copy.copy(self)
        dense.drop = 0
        return dense


def toy(**settings) -> Toy:
    """Return a toy with random weights."""
    return Toy(ToyConfig(**settings))
