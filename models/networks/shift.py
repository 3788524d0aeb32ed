"""Temporal shift (TSM, Lin et al. 2019): mixes neighbouring frames by moving channels in time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dvexport import gates
from dvexport.models.config import Shift

__all__ = ["BidirectionalShift", "OnlineShift", "next_frame", "temporal_shift"]


def next_frame(x: Tensor) -> Tensor:
    """Return the next frame's `x` `[N, ...]`, zeros for the last frame of each clip. Not causal."""
    if torch.compiler.is_exporting():
        return torch.cat([x[1:], torch.zeros_like(x[:1])])
    return gates.delay(x.flip(0), name="next").flip(0)


class BidirectionalShift(nn.Module):
    """Offline TSM: channels [0, f) from frame t+1, [f, 2f) from t-1, f = C // div, zeros at the ends."""

    def __init__(self, name: str, div: int) -> None:
        super().__init__()
        self.name, self.div = name, div

    def forward(self, x: Tensor) -> Tensor:
        """Shift `[N, C, H, W]`."""
        fold = x.shape[1] // self.div
        ahead = next_frame(x[:, :fold])
        behind = gates.delay(x[:, fold : 2 * fold], name=f"{self.name}.shift")
        return torch.cat([ahead, behind, x[:, 2 * fold :]], dim=1)


class OnlineShift(nn.Module):
    """Online TSM: channels [0, C // div) from frame t-1 (the state that the official demo caches)."""

    def __init__(self, name: str, div: int) -> None:
        super().__init__()
        self.name, self.div = name, div

    def forward(self, x: Tensor) -> Tensor:
        """Shift `[N, C, H, W]`."""
        fold = x.shape[1] // self.div
        behind = gates.delay(x[:, :fold], name=f"{self.name}.shift")
        return torch.cat([behind, x[:, fold:]], dim=1)


def temporal_shift(kind: Shift, name: str, div: int) -> nn.Module:
    """Return the shift module of the block called `name`."""
    if kind == "none":
        return nn.Identity()
    return {"bidirectional": BidirectionalShift, "online": OnlineShift}[kind](name, div)
