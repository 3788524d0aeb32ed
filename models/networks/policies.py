"""The decision makers of AdaFuse and D-STEP: channel policies and tile masks, and what they cost.

Channel policy (AdaFuse, eq. 4): [GAP(x_{t-1}); GAP(x_t)] -> linear -> BN -> ReLU -> linear -> one
action per channel. Tile mask (D-STEP, section 3.1; the code takes it from DGNet): adaptive average
pooling to the tile grid -> 3x3 convolution -> one logit per tile, active where it is >= 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvexport import gates
from dvexport.errors import TraceError
from dvexport.models.config import ResNetConfig
from dvexport.models.networks.shift import next_frame

__all__ = [
    "BlockGates",
    "ChannelPolicy",
    "Decision",
    "TileMask",
    "executed_macs",
    "pool_to_grid",
]


@dataclass(frozen=True)
class Decision:
    """What the gates of one block decided in the last forward pass.

    Attributes:
        gate: name of the gate, the block's path.
        action: integers `[N, C]` (evaluation) or one-hot floats `[N, C, 3]` (training); None: no policy.
        tiles: `[N, gh, gw]`, bool (evaluation) or 0/1 floats (training); None: no mask.
        sizes: output height and width of the block's convolutions.
        macs: MACs per frame of each of the block's convolutions if all is computed (no downsample).
    """

    gate: str
    action: Tensor | None
    tiles: Tensor | None
    sizes: tuple[tuple[int, int], ...]
    macs: tuple[int, ...]

    @property
    def one_hot(self) -> Tensor | None:
        """The actions as floats `[N, C, 3]`."""
        if self.action is None or self.action.is_floating_point():
            return self.action
        return F.one_hot(self.action, 3).float()


def executed_macs(decision: Decision) -> Tensor:
    """Return the MACs `[N]` that each frame of a gated block asks for (D-STEP eq. 2), differentiable.

    conv1 computes channel c in a tile iff the frame computes c and the tile is active, or the next
    frame reuses c and has the tile active (eq. 2 uses this frame's mask for both, which counts too
    little where a tile becomes active). conv2 reads the channels not skipped, in the active tiles.
    """
    hot, tiles = decision.one_hot, decision.tiles
    sample = hot if hot is not None else tiles
    assert sample is not None
    if hot is None:
        keep = active = sample.new_ones(len(sample), 1, dtype=torch.float32)
        reused_next = torch.zeros_like(keep)
    else:
        keep, active = hot[..., gates.COMPUTE], 1 - hot[..., gates.SKIP]
        reused_next = next_frame(hot[..., gates.REUSE])
    area = _pixels(tiles, decision.sizes[0], keep)
    area_next = area if tiles is None else next_frame(area)
    both = (keep * reused_next).mean(1) * (area * area_next).mean((1, 2))
    first = keep.mean(1) * area.mean((1, 2)) + reused_next.mean(1) * area_next.mean((1, 2)) - both
    total = first * decision.macs[0]
    inputs = active.mean(1)
    for size, macs in zip(decision.sizes[1:], decision.macs[1:], strict=True):
        total = total + inputs * _pixels(tiles, size, keep).mean((1, 2)) * macs
        inputs = torch.ones_like(inputs)
    return total


def _pixels(tiles: Tensor | None, size: tuple[int, int], like: Tensor) -> Tensor:
    """Return which output pixels are active, `[N, *size]`; `[N, 1, 1]` of ones without a mask."""
    if tiles is None:
        return like.new_ones(len(like), 1, 1)
    return gates.upsample_tiles(tiles.to(like.dtype), size).squeeze(1)


class ChannelPolicy(nn.Module):
    """Chooses an action for each of `channels` channels from the globally pooled block input.

    Args:
        gate: name of the gate.
        fc0, fc1: the linear layers, which blocks of equal shape may share.
        config: options of the model.
    """

    def __init__(self, gate: str, fc0: nn.Linear, fc1: nn.Linear, config: ResNetConfig) -> None:
        super().__init__()
        self.gate, self.config = gate, config
        self.fc0 = fc0
        self.bn = nn.BatchNorm1d(fc0.out_features) if config.gate_bn else None
        self.fc1 = fc1
        self.generator: torch.Generator | None = None
        self.noise_scale = 1.0

    @staticmethod
    def linears(inputs: int, channels: int, config: ResNetConfig) -> tuple[nn.Linear, nn.Linear]:
        """Return the two linear layers as the official code makes them: N(0, 0.001), no bias."""
        hidden = config.policy_hidden(channels)
        fc0 = nn.Linear(inputs * (2 if config.history else 1), hidden)
        fc1 = nn.Linear(hidden, channels * len(config.actions))
        for layer in (fc0, fc1):
            nn.init.normal_(layer.weight, 0, 0.001)
            nn.init.zeros_(layer.bias)
        return fc0, fc1

    def logits(self, x: Tensor) -> Tensor:
        """Return `[N, C, A]` for the block input `[N, Cin, H, W]`; the action is the fastest index."""
        v = x.mean((2, 3)) if self.config.gate_pool == "mean" else x.amax((2, 3))
        if self.config.history:
            v = torch.cat([gates.delay(v, name=f"{self.gate}.policy"), v], dim=1)
        v = self.fc0(v)
        if self.bn is not None:
            v = self.bn(v)
        if self.config.gate_relu:
            v = F.relu(v)
        return self.fc1(v).reshape(x.shape[0], -1, len(self.config.actions))

    def forward(self, x: Tensor) -> Tensor:
        """Return actions: integers `[N, C]`, or one-hot floats `[N, C, 3]` in training."""
        logits = self.logits(x)
        if self.training:
            return self._spread(_gumbel_one_hot(logits, self.config.tau, self.generator, self.noise_scale))
        if self.config.sampling == "official":
            return self._sample(logits)
        return self._to_action(logits.argmax(dim=2))

    def _sample(self, logits: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise TraceError(
                "sampled decisions can't be exported: they differ from run to run",
                where=self.gate,
                hint="--set sampling=argmax decides deterministically",
            )
        return self._to_action(_gumbel_one_hot(logits, self.config.tau, self.generator).argmax(dim=2))

    def _to_action(self, index: Tensor) -> Tensor:
        """Return the actions that the policy's outputs `index` stand for."""
        match self.config.actions:
            case (gates.SKIP, gates.COMPUTE):
                return index * 2
            case (gates.REUSE, gates.COMPUTE):
                return index + 1
        return index

    def _spread(self, one_hot: Tensor) -> Tensor:
        """Return `[N, C, 3]` with the columns of the actions that this policy has."""
        if len(self.config.actions) == 3:
            return one_hot
        absent = torch.zeros_like(one_hot[..., :1])
        first, second = one_hot[..., :1], one_hot[..., 1:]
        order = [first, absent, second] if self.config.actions[0] == gates.SKIP else [absent, first, second]
        return torch.cat(order, dim=2)


def _gumbel_one_hot(logits: Tensor, tau: float, generator: torch.Generator | None, noise_scale: float = 1.0) -> Tensor:
    """Return a one-hot sample over the last axis, straight-through (as F.gumbel_softmax(hard=True)).

    Training may lower `noise_scale` to 0, where the sample is the argmax that evaluation decides by.
    Without a generator it draws exactly what the official code draws from torch's global one.
    """
    log_probability = torch.log(F.softmax(logits, dim=-1).clamp(min=1e-8))
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    soft = F.softmax((log_probability + noise_scale * noise) / tau, dim=-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    return hard - soft.detach() + soft


class TileMask(nn.Module):
    """Decides which cells of a `ceil(H'/tile) x ceil(W'/tile)` grid over the block's output are active."""

    def __init__(self, channels: int, tile: int, tau: float) -> None:
        super().__init__()
        self.tile, self.tau = tile, tau
        self.conv = nn.Conv2d(channels, 1, 3, padding=1)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.generator: torch.Generator | None = None
        self.noise_scale = 1.0

    def logits(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return `[N, gh, gw]` for the block input `x` and the block's output `size`."""
        grid = (-(-size[0] // self.tile), -(-size[1] // self.tile))
        return self.conv(pool_to_grid(x, grid)).squeeze(1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return `[N, gh, gw]`: bool, or in training 0/1 floats through a straight-through sigmoid."""
        logits = self.logits(x, size)
        if not self.training:
            return logits >= 0
        # Difference of two Gumbel variables is logistic: log u - log(1 - u) (D-STEP, section 3.2).
        u = torch.empty_like(logits).uniform_(1e-6, 1 - 1e-6, generator=self.generator)
        noise = torch.log(u) - torch.log1p(-u)
        soft = torch.sigmoid((logits + self.noise_scale * noise) / self.tau)
        hard = (soft >= 0.5).to(soft.dtype)
        return hard - soft.detach() + soft


def pool_to_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average `[N, C, H, W]` over `grid` cells: cell i covers floor(i*H/g) to ceil((i+1)*H/g).

    The rule of adaptive_avg_pool2d in operations that every exporter has.
    """
    height, width = x.shape[2], x.shape[3]
    if height % grid[0] == 0 and width % grid[1] == 0:
        cell = (height // grid[0], width // grid[1])
        return x if cell == (1, 1) else F.avg_pool2d(x, cell)
    rows, columns = _pool_matrix(height, grid[0], x), _pool_matrix(width, grid[1], x)
    return torch.matmul(rows, torch.matmul(x, columns.T))


def _pool_matrix(pixels: int, cells: int, like: Tensor) -> Tensor:
    """Return `[cells, pixels]`, the weight of each pixel in the mean of each cell."""
    rows = []
    for i in range(cells):
        start, end = i * pixels // cells, -(-(i + 1) * pixels // cells)
        rows.append([1.0 / (end - start) if start <= p < end else 0.0 for p in range(pixels)])
    return torch.tensor(rows, dtype=like.dtype, device=like.device)


class BlockGates(nn.Module):
    """The gates of one residual block. `decision` holds what they decided last (eager mode).

    Args:
        gate: the block's path, such as `layer1.0`.
        policy: the channel policy or None.
        mask: the tile mask or None.
        config: options of the model.
    """

    def __init__(self, gate: str, policy: ChannelPolicy | None, mask: TileMask | None, config: ResNetConfig) -> None:
        super().__init__()
        self.gate, self.config = gate, config
        self.policy, self.mask = policy, mask
        self.decision: Decision | None = None

    def forward(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Return (action, tiles) for the block input `x` and the block's output `size`."""
        tiles = self.mask(x, size) if self.mask is not None else None
        if tiles is not None and self.config.semantics == "paper":
            x = x * gates.upsample_tiles(tiles.to(x.dtype), (x.shape[2], x.shape[3]))
        action = self.policy(x) if self.policy is not None else None
        return action, tiles

    def hidden_tiles(self, tiles: Tensor | None) -> Tensor | None:
        """Return the tiles that mask the block's first convolution.

        D-STEP's code leaves it unmasked in training; its paper (eq. 1) does not.
        """
        return None if self.training and self.config.semantics == "code" else tiles

    def __getstate__(self) -> dict[str, Any]:
        """Leave the decision out of copies: its tensors may belong to an autograd graph."""
        return {**self.__dict__, "decision": None}
