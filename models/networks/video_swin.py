"""Video-Swin: attention in shifted windows of 8 x 7 x 7 tokens, four stages with patch merging between them.

Names of layers and weights are those of the official code (Video-Swin db018fb), without mmcv's `backbone.`
and with `head` for `cls_head.fc_cls`. Tokens stay in one row `[B, tokens, C]`; cutting them into shifted
windows is one gather by a table, and putting them back another.

Token pruning (`sta.r`) is ours: the authors' code for Video-Swin was never released. It is the simplest
schedule that gives the published FLOPs: each frame is a group; r of its 28 x 28 tokens are dropped before
stage 2, in forward direction, and r / 4 of its 14 x 14 in the middle of stage 3, in reverse direction. The
metric is the mean key of the block that comes next. What is dropped stays dropped: after patch merging as
large a part of the merged tokens goes, those with most dropped members first, among equals the weakest.
Norms, projections and MLPs run on the tokens that are left, attention on whole windows. There a dropped
token is zero, like padding, and masked out like a token of another region, so that nothing attends to it;
patch merging takes its last value.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvexport import gates
from dvexport.errors import UsageError
from dvexport.models.base import VideoModel
from dvexport.models.config import VideoSwinConfig
from dvexport.models.networks.classifier import classifier_of_clips
from dvexport.models.networks.vit import DropPath, Mlp, drop_rates
from dvexport.models.pruning import sta
from dvexport.models.pruning.random_drop import drop_at_random, random_scores

__all__ = ["PatchMerging", "SwinBlock", "VideoSwin", "WindowAttention", "relative_positions"]

_MASKED = -50.0
"""What is added to the logit of a token that must not be attended to. The official code has -100, with which weights
are subnormal numbers, and arithmetic on those several times slower: e^-50 is nothing beside 1 in float32 as well."""

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Survivors:
    """The tokens that are left of `count`.

    Attributes:
        places: int64 `[B, K]`, where they stand among all.
        slots: int64 `[B, count]`, for each token its place among the survivors, K for a dropped one.
        last: `[B, count, C]`, the values of all tokens when some were dropped.
    """

    places: Tensor
    slots: Tensor
    last: Tensor

    def refilled(self, x: Tensor) -> Tensor:
        """Return all tokens: survivors as in `x` `[B, K, C]`, dropped ones with their last value."""
        count, kept = self.slots.shape[1], x.shape[1]
        places = torch.arange(count, device=x.device)
        return _take(torch.cat([x, self.last], 1), torch.where(self.slots < kept, self.slots, kept + places))


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Return rows of `values` `[B, N, C]`: those of `index` `[M]` for every clip, or of its own `[B, M]`."""
    if index.ndim == 1:
        return values.index_select(1, index)
    return sta.rows(values, index)


class WindowTable:
    """How the tokens of a stage lie in windows: tables of integers, made once a stage.

    Args:
        size: tokens in time, height and width.
        window: largest window.
        shifted: windows are shifted by half of their size.
    """

    def __init__(self, size: Size, window: Size, shifted: bool) -> None:
        # A side that fits in a window is one window, and not shifted (the official get_window_size).
        self.window = tuple(min(w, s) for w, s in zip(window, size, strict=True))
        shift = tuple(w // 2 if shifted and s > w else 0 for w, s in zip(window, size, strict=True))
        padded = tuple(-(-s // w) * w for w, s in zip(self.window, size, strict=True))
        self.count = size[0] * size[1] * size[2]
        self.padded = padded != size
        place = torch.full(padded, self.count, device="cpu")
        place[: size[0], : size[1], : size[2]] = torch.arange(self.count, device="cpu").reshape(size)
        order = self._cut(place.roll([-s for s in shift], (0, 1, 2)))
        self.order = order.flatten()
        """Token of each place of each window, `count` for padding."""
        real = self.order < self.count
        self.inverse = torch.empty(self.count, dtype=torch.int64, device="cpu")
        self.inverse[self.order[real]] = torch.arange(len(self.order), device="cpu")[real]
        self.masks: Tensor | None = None
        """What shifted windows add to logits, `[masks, 1, places, places]`."""
        self.which: Tensor | None = None
        """Which of the masks is each window's."""
        if any(shift):
            self.masks, self.which = self._masks(padded, shift)  # type: ignore[arg-type]

    def _cut(self, grid: Tensor) -> Tensor:
        """Return `[windows, places]` of a grid of tokens."""
        d, h, w = self.window
        parts = grid.reshape(grid.shape[0] // d, d, grid.shape[1] // h, h, grid.shape[2] // w, w)
        return parts.permute(0, 2, 4, 1, 3, 5).reshape(-1, d * h * w)

    def _masks(self, padded: Size, shift: Size) -> tuple[Tensor, Tensor]:
        """Return what to add to logits, and which of it for each window: tokens of other regions are not seen.

        Few windows differ: those at the end of an axis, where it was shifted, from the others.

        Returns:
            `[masks, 1, places, places]`; int64 `[windows]`.
        """
        region = torch.zeros(padded, device="cpu")
        sides = [
            (slice(0, -w), slice(-w, -s), slice(-s, None)) if s else (slice(None),)
            for w, s in zip(self.window, shift, strict=True)
        ]
        for number, part in enumerate(itertools.product(*sides)):
            region[part] = number
        regions = self._cut(region)
        # Numbers only have to differ inside of a window, so windows cut alike get the same ones.
        regions = torch.stack([window.unique(return_inverse=True)[1] for window in regions])
        cuts, which = regions.unique(dim=0, return_inverse=True)
        return torch.where(cuts[:, None, :] != cuts[:, :, None], _MASKED, 0.0)[:, None], which


class WindowAttention(nn.Module):
    """Self-attention in windows, with a learnt bias for each relative position.

    Args:
        dim: channels.
        window: the window that the table of biases is made for.
        heads: attention heads.
    """

    def __init__(self, dim: int, window: Size, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        rows = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        self.register_buffer("relative_position_index", relative_positions(window), persistent=False)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, table: WindowTable, survivors: Survivors | None = None) -> Tensor:
        """Return `[B, K, C]` for the tokens `[B, K, C]`, all of a stage's or its survivors."""
        batch, kept, channels = x.shape
        order, inverse = table.order.to(x.device), table.inverse.to(x.device)
        if table.padded or survivors is not None:
            x = F.pad(x, (0, 0, 0, 2 if table.padded else 1))  # after the tokens: a dropped one, and padding
        rows = self.qkv(x)
        if survivors is not None:
            padding = torch.full_like(survivors.slots[:, :1], kept + 1)
            order = torch.cat([survivors.slots, padding], 1).index_select(1, order)
            inverse = inverse.index_select(0, survivors.places.flatten()).reshape(batch, kept)
        elif table.padded:
            order = torch.where(order < kept, order, kept + 1)
        places = table.window[0] * table.window[1] * table.window[2]
        query, key, value = (
            part.reshape(-1, places, self.num_heads, channels // self.num_heads).transpose(1, 2)
            for part in _take(rows, order).split(channels, dim=2)
        )
        index = self.relative_position_index[:places, :places].flatten()  # type: ignore[index]
        bias = self.relative_position_bias_table.t().index_select(1, index).reshape(-1, places, places)
        logits = (query * self.scale) @ key.transpose(2, 3) + bias
        masks = []
        if table.masks is not None and table.which is not None:
            mask = table.masks.to(x).index_select(0, table.which.to(x.device))
            masks.append(mask if batch == 1 else mask.repeat(batch, 1, 1, 1))
        if survivors is not None:
            dropped = torch.where(order == kept, _MASKED, 0.0).to(x.dtype)
            masks.append(dropped.reshape(-1, 1, 1, places))
        if masks:
            logits = logits + functools.reduce(torch.minimum, masks)
        found = (logits.softmax(dim=-1) @ value).transpose(1, 2).reshape(batch, -1, channels)
        return self.proj(_take(found, inverse))


def relative_positions(window: Size) -> Tensor:
    """Return the row of the bias table for each pair of places in a window, `[places, places]`."""
    place = torch.stack(torch.meshgrid(*(torch.arange(side) for side in window), indexing="ij")).flatten(1)
    apart = place[:, :, None] - place[:, None, :]
    d, h, w = (apart[axis] + window[axis] - 1 for axis in range(3))
    return (d * (2 * window[1] - 1) + h) * (2 * window[2] - 1) + w


class SwinBlock(nn.Module):
    """Window attention and MLP, each after a layer norm and on a residual branch."""

    def __init__(self, dim: int, heads: int, config: VideoSwinConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, config.window, heads)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, table: WindowTable, survivors: Survivors | None = None) -> Tensor:
        """Return `[B, K, C]` for the tokens `[B, K, C]` of a stage, or its survivors."""
        x = x + self.drop_path(self.attn(self.norm1(x), table, survivors))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Join 2 x 2 tokens of a frame into one of twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Return `[B, tokens / 4, 2 C]` for `[B, tokens, C]`; an odd side is padded with zeros."""
        frames, height, width = size
        x = x.reshape(-1, height, width, x.shape[2])
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # Columns inside rows inside channels: the official order is (row, column) = 00, 10, 01, 11.
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=3)
        x = x.reshape(-1, frames * x.shape[1] * x.shape[2], x.shape[3])
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    """Blocks of one resolution, every second one with shifted windows, and what merges patches after them."""

    def __init__(self, index: int, config: VideoSwinConfig, drop_paths: list[float]) -> None:
        super().__init__()
        dim, heads = config.embed_dim * 2**index, config.heads[index]
        self.size = config.stage_size(index)
        self.blocks = nn.ModuleList(SwinBlock(dim, heads, config, rate) for rate in drop_paths)
        self.downsample = PatchMerging(dim) if index + 1 < len(config.depths) else None
        self.tables = [WindowTable(self.size, config.window, shifted) for shifted in (False, True)]
        self.inherits: sta.PruningStage | None = None
        """How many tokens go at the start, since the stage before had dropped as large a part."""
        self.pruning: sta.PruningStage | None = None
        self.scores: np.ndarray | None = None
        """What tokens are dropped by, if not by STA."""

    def forward(self, x: Tensor, dropped: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the tokens for the next stage, and how many members of each were dropped, None if none was.

        Args:
            x: `[B, tokens, C]`.
            dropped: the same of these tokens, `[B, tokens]`.
        """
        survivors = None
        if dropped is not None and self.inherits is not None:
            x, survivors = _inherit(x, dropped, self.inherits)
        for number, block in enumerate(self.blocks):
            if self.pruning is not None and self.pruning.block == number and not sta.is_off():
                x, survivors = _drop(x, block, self.pruning, survivors, self.scores)
            x = block(x, self.tables[number % 2], survivors)
        lost = None
        if survivors is not None:
            lost = _merged((survivors.slots == x.shape[1]).to(x.dtype), self.size)
            x = survivors.refilled(x)
        return (x, None) if self.downsample is None else (self.downsample(x, self.size), lost)


def _merged(dropped: Tensor, size: Size) -> Tensor:
    """Return for each merged token how many of its 2 x 2 members were dropped, `[B, merged]`."""
    frames, height, width = size
    grid = F.pad(dropped.reshape(-1, height, width), (0, width % 2, 0, height % 2))
    counts = grid[:, 0::2, 0::2] + grid[:, 1::2, 0::2] + grid[:, 0::2, 1::2] + grid[:, 1::2, 1::2]
    return counts.reshape(-1, frames * counts.shape[1] * counts.shape[2])


def _inherit(x: Tensor, dropped: Tensor, stage: sta.PruningStage) -> tuple[Tensor, Survivors]:
    """Drop merged tokens: those with most dropped members first, among equals the weakest."""
    weakness = sta.weakness(x, stage).flatten(1)
    # Below 1, so that it decides among equals only.
    scores = (dropped + 0.5 * weakness).split(stage.tokens, dim=1)
    kept = [
        gates.select_tokens(tokens, scores[group], stage.keep, gate=stage.gate(group))
        for group, tokens in enumerate(x.split(stage.tokens, dim=1))
    ]
    places = _places([index for _, index in kept], stage)
    return torch.cat([tokens for tokens, _ in kept], dim=1), _survivors(x, places)


def _drop(
    x: Tensor, block: nn.Module, stage: sta.PruningStage, before: Survivors | None, scores: np.ndarray | None
) -> tuple[Tensor, Survivors]:
    """Drop tokens before a block, whose mean key is the metric; or by `scores`, at random."""
    if scores is not None:
        kept, index = drop_at_random(x, stage, scores)
    else:
        weight, bias = sta.mean_key(block.attn, "qkv", block.attn.num_heads, "attn")  # type: ignore[arg-type,union-attr]
        metric = F.linear(block.norm1(x), weight, bias)  # type: ignore[operator]
        kept, index = sta.select_survivors(x, metric, stage)
    places = _places(index, stage)
    if before is None:
        return kept, _survivors(x, places)
    return kept, _survivors(before.refilled(x), before.places.gather(1, places))


def _places(index: list[Tensor], stage: sta.PruningStage) -> Tensor:
    return torch.cat([group * stage.tokens + own for group, own in enumerate(index)], dim=1)


def _survivors(x: Tensor, places: Tensor) -> Survivors:
    """Return the survivors at `places` of all tokens `x`."""
    slots = torch.full(x.shape[:2], places.shape[1], device=x.device)
    numbers = torch.arange(places.shape[1], device=x.device).expand(x.shape[0], -1)
    return Survivors(places, slots.scatter(1, places, numbers), x)


class PatchEmbedding(nn.Module):
    """Project patches of 2 x 4 x 4 pixels: `[B*T, 3, H, W]` to `[B, tokens, C]`, time first."""

    def __init__(self, config: VideoSwinConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, config.embed_dim, config.patch, stride=config.patch)
        self.norm = nn.LayerNorm(config.embed_dim)
        self.frames, self.patch = config.frames // config.patch[0], config.patch

    def forward(self, frames: Tensor) -> Tensor:
        """Return the tokens of each clip; sides that are no multiple of a patch are padded with zeros."""
        height, width = frames.shape[2:]
        x = frames.reshape(-1, 3 * self.patch[0], height, width)
        x = F.pad(x, (0, -width % self.patch[2], 0, -height % self.patch[1]))
        weight = self.proj.weight.transpose(1, 2).flatten(1, 2)
        x = F.conv2d(x, weight, self.proj.bias, stride=self.patch[1:]).flatten(2).transpose(1, 2)
        return self.norm(x.reshape(-1, self.frames * x.shape[1], x.shape[2]))


class VideoSwin(VideoModel):
    """Video-Swin T, S and B, with token pruning where `config.sta_r` asks for it.

    Args:
        config: the options.
        name: how the zoo and bundles call it.
    """

    def __init__(self, config: VideoSwinConfig, name: str = "video_swin") -> None:
        super().__init__(**classifier_of_clips(config, name, whole_clip=True, views="video_swin"))
        rates = drop_rates(config.drop_path, sum(config.depths))
        self.patch_embed = PatchEmbedding(config)
        self.layers = nn.ModuleList(
            Stage(i, config, [rates.pop(0) for _ in range(depth)]) for i, depth in enumerate(config.depths)
        )
        channels = config.embed_dim * 2 ** (len(config.depths) - 1)
        self.norm, self.dropout = nn.LayerNorm(channels), nn.Dropout(config.dropout)
        self.head = nn.Linear(channels, config.classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        if config.sta_r:
            self._prune(config)

    def _prune(self, config: VideoSwinConfig) -> None:
        """Say where how many tokens are dropped, a frame: r of stage 2, then r / 4 and r / 4 more of stage 3."""
        r, stages = config.sta_r, [layer for layer in self.layers if isinstance(layer, Stage)]
        frames, tokens = stages[1].size[0], [stage.size[1] * stage.size[2] for stage in stages]
        if r % 16 or r > tokens[1] // 2 or r // 2 >= tokens[2] or r // 8 >= tokens[3]:
            raise UsageError(
                f"sta.r={r} does not fit Video-Swin: stage 2 has {tokens[1]} tokens a frame",
                why="at most half of them can be dropped, and r / 4, r / 4 and r / 8 of later stages, never all",
                hint="a multiple of 16, such as sta.r=192 at 224 x 224",
            )
        middle = config.depths[2] // 2
        left = tokens[2] - r // 4
        first = sta.PruningStage(0, 0, frames, tokens[1], tokens[1] - r, "forward")
        second = sta.PruningStage(1, 0, frames, tokens[2], left, "forward", stages[2].size)
        third = sta.PruningStage(2, middle, frames, left, left - r // 4, "reverse")
        last = sta.PruningStage(3, 0, frames, tokens[3], tokens[3] - r // 8, "forward", stages[3].size)
        stages[1].pruning, stages[2].inherits, stages[2].pruning, stages[3].inherits = first, second, third, last
        if config.sta_method == "random":
            for stage in stages[1:3]:
                assert stage.pruning is not None
                stage.scores = random_scores(stage.pruning, config.sta_seed)
        self.token_grid, self.token_groups = stages[1].size, [first, second, third, last]
        self.without_pruning = functools.partial(sta.without_pruning, self)

    def forward(self, frames: Tensor) -> Tensor:
        """Return logits `[B, classes]` of B clips.

        Args:
            frames: `[B*T, 3, H, W]`, clips of `config.frames` frames one after another.
        """
        x = self.patch_embed(frames)
        dropped = None
        for layer in self.layers:
            x, dropped = layer(x, dropped)
        return self.head(self.dropout(self.norm(x).mean(1)))
