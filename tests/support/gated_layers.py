"""A model of one gated layer of any geometry, whose decisions can be forced, and decisions to force."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dvexport import gates
from dvexport.passes.expose_probes import forced_name

__all__ = ["CIN", "COUT", "FRAMES", "GATE", "SIZE", "Layer", "decisions_of", "frames_of", "lively"]

Net = TypeVar("Net", bound=nn.Module)

CIN, COUT, FRAMES, SIZE, GATE = 3, 20, 4, (11, 14), "g"


class Layer(nn.Module):
    """One gated layer, its decisions taken from the frame or forced; the output is its plane, pixel by pixel.

    A second gated layer reads the first one's active channels, so that what a gate skips matters to a reader.
    """

    def __init__(self, conv: nn.Module, bn: nn.Module | None = None, *, reader: nn.Module | None = None,
                 grid: tuple[int, int] = (3, 2), activation: str = "relu") -> None:  # fmt: skip
        super().__init__()
        self.conv, self.bn, self.grid, self.activation = conv, bn, grid, activation
        self.reader = reader or nn.Conv2d(COUT, 4, 1)
        self.policy, self.mask = nn.Linear(CIN, 3 * COUT), nn.Linear(CIN, grid[0] * grid[1])
        self.forced: dict[str, Tensor] = {}

    def forward(self, frames: Tensor) -> Tensor:
        mean = frames.mean((2, 3))
        action = self.policy(mean).reshape(-1, COUT, 3).argmax(-1)
        tiles = self.mask(mean).reshape(-1, *self.grid) >= 0
        action = self.forced.get(forced_name(GATE, "action"), action)
        tiles = self.forced.get(forced_name(GATE, "tiles"), tiles)
        u = gates.gated_conv(
            frames, self.conv, self.bn, gate=GATE, activation=self.activation, action=action, tiles=tiles
        )
        z = gates.gated_conv(u, self.reader, gate="reader", active_in=action)
        return gates.frame_mean(torch.cat([u.flatten(1), z.flatten(1)], 1))

    def eager(self, frames: np.ndarray, decisions: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run a clip under forced decisions."""
        self.forced = {name: torch.from_numpy(value) for name, value in decisions.items()}
        try:
            with torch.no_grad():
                return self(torch.from_numpy(frames)).numpy()
        finally:
            self.forced = {}


def lively(make: Callable[[], Net]) -> Net:
    """Make a model in evaluation mode, with weights and statistics that keep every path alive."""
    torch.manual_seed(0)
    net = make().eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return net


def frames_of(seed: int = 0) -> np.ndarray:
    """Noise `[T, 3, H, W]`."""
    return np.random.default_rng(seed).standard_normal((FRAMES, CIN, *SIZE)).astype(np.float32)


def decisions_of(grid: tuple[int, int]) -> dict[str, dict[str, np.ndarray]]:
    """Forced inputs by pattern: all, none, reuse after skip with tiles newly active, and at random."""
    rng = np.random.default_rng(0)

    def series(*actions: int) -> np.ndarray:
        return np.repeat(np.array(actions, np.int64)[:, None], COUT, 1)

    everywhere = np.ones((FRAMES, *grid), bool)
    growing = np.arange(grid[0])[None, :, None] < np.arange(FRAMES)[:, None, None] * np.ones((1, 1, grid[1]))
    patterns = {
        "all": (series(2, 2, 2, 2), everywhere),
        "none": (series(0, 0, 0, 0), ~everywhere),
        "reuse after skip": (series(2, 0, 1, 1), growing),
        "random": (rng.integers(0, 3, (FRAMES, COUT)), rng.random((FRAMES, *grid)) < 0.5),
    }
    return {
        name: {forced_name(GATE, "action"): action, forced_name(GATE, "tiles"): tiles}
        for name, (action, tiles) in patterns.items()
    }
