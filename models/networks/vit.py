"""The plain video transformer: VideoMAE's ViT, which reads a clip as one sequence of tokens.

A token is a tubelet of 2 frames by 16 x 16 pixels; 16 frames at 224 x 224 give 8 x 14 x 14 = 1568.
Names of layers and weights are those of the official code (VideoMAE 14ef8d8, `modeling_finetune.py`).
Where this code is written differently, the results are the same. A tubelet's frames lie one after another in
`[T, 3, H, W]`, so embedding them is a 2-D convolution over 2 x 3 channels. Queries, keys and values are cut from one
product with 4 axes at most, which suits backends.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvexport.models.base import VideoModel
from dvexport.models.config import ViTConfig
from dvexport.models.networks.classifier import classifier_of_clips
from dvexport.models.pruning import sta

__all__ = ["Attention", "Block", "Mlp", "TubeletEmbedding", "VisionTransformer", "drop_rates", "position_table"]


def position_table(tokens: int, dim: int) -> Tensor:
    """Return the fixed sine and cosine positions `[1, tokens, dim]`, computed in float64.

    Even channels are sines, odd ones cosines; both of a pair have one wavelength (Vaswani et al. 2017, 3.5).
    """
    channel = torch.arange(dim, dtype=torch.float64)
    wavelength = 10000 ** (2 * (channel // 2) / dim)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] / wavelength
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]


class TubeletEmbedding(nn.Module):
    """Cut a clip into tubelets and project each: `[B*T, 3, H, W]` to `[B, tokens, dim]`, time first."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        kernel = (config.tubelet, config.patch, config.patch)
        self.proj = nn.Conv3d(3, config.embed_dim, kernel, stride=kernel)
        self.tubelet, self.patch, self.tokens = config.tubelet, config.patch, config.tokens

    def forward(self, frames: Tensor) -> Tensor:
        """Return the tokens of each clip, ordered by time, row and column."""
        height, width = frames.shape[2:]
        x = frames.reshape(-1, 3 * self.tubelet, height, width)
        weight = self.proj.weight.transpose(1, 2).flatten(1, 2)  # channels of a frame, frame by frame
        x = F.conv2d(x, weight, self.proj.bias, stride=self.patch)
        x = x.flatten(2).transpose(1, 2)
        return x.reshape(-1, self.tokens, x.shape[2])


class Attention(nn.Module):
    """Self-attention of all tokens; queries and values have a bias, keys have none (BEiT's rule)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, N, C]` for `[B, N, C]`."""
        batch, tokens, channels = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        query, key, value = (
            part.reshape(batch, tokens, self.num_heads, -1).transpose(1, 2)
            for part in F.linear(x, self.qkv.weight, bias).split(channels, dim=2)
        )
        weights = ((query * self.scale) @ key.transpose(2, 3)).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(batch, tokens, channels))


class Mlp(nn.Module):
    """Two linear layers with a GELU (the exact one, by the error function) between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, N, C]` for `[B, N, C]`."""
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Leave a residual branch out for some clips of a batch, in training (stochastic depth)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return x, whole clips of it zero at `rate` and the others scaled up to keep the mean."""
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * kept / (1 - self.rate)


def drop_rates(last: float, depth: int) -> list[float]:
    """Return the rate of stochastic depth of each block, rising from 0 to `last`."""
    return [last * block / max(depth - 1, 1) for block in range(depth)]


class Block(nn.Module):
    """Attention and MLP, each after a layer norm and on a residual branch."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__()
        dim, eps = config.embed_dim, config.norm_eps
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, config.heads)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, N, C]` for `[B, N, C]`."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VisionTransformer(VideoModel):
    """VideoMAE's ViT, with STA's token pruning where `config.sta_r` asks for it.

    Args:
        config: the options.
        name: how the zoo and bundles call it.
    """

    def __init__(self, config: ViTConfig, name: str = "vit") -> None:
        super().__init__(**classifier_of_clips(config, name, whole_clip=True, views="videomae"))
        rates = drop_rates(config.drop_path, config.depth)
        self.patch_embed = TubeletEmbedding(config)
        self.register_buffer("positions", position_table(config.tokens, config.embed_dim), persistent=False)
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.Identity() if config.mean_pooling else nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.fc_norm = nn.LayerNorm(config.embed_dim, eps=config.head_eps) if config.mean_pooling else nn.Identity()
        self.fc_dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.embed_dim, config.classes)
        _initialise(self)
        if config.sta_r:
            sta.prune(self, grid=config.grid, settings=config.sta)

    def tokens(self, frames: Tensor) -> Tensor:
        """Return the tokens `[B, N, C]` after all blocks, those that STA kept if it prunes."""
        x = self.patch_embed(frames) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, frames: Tensor) -> Tensor:
        """Return logits `[B, classes]` of B clips.

        Args:
            frames: `[B*T, 3, H, W]`, clips of `config.frames` frames one after another.
        """
        x = self.tokens(frames)
        x = self.fc_norm(x.mean(1)) if self.config.mean_pooling else x[:, 0]
        return self.head(self.fc_dropout(x))


def _initialise(model: nn.Module) -> None:
    """Draw linear weights from N(0, 0.02), cut at 2 absolute, as the official code does."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
