"""Losses that train dynamic gates (D-STEP, section 3.2, eq. 2 and 3).

    L = L_task + lambda(e) (F / F_S - D)^2 + gamma L_bound

F is the executed cost of the gated blocks, F_S what they cost with everything computed, D the
target. lambda(e) is 0 for the first K epochs, then alpha exp(beta e). L_bound keeps each tile
mask's density within bounds that are tight at first and relax during training, so that no mask
ends at all-or-nothing before it has learned anything (Verelst and Tuytelaars, DynConv, 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dvexport.models.networks.policies import Decision, executed_macs

__all__ = ["bound_loss", "executed_fraction", "mask_bounds", "sparsity_loss", "sparsity_weight"]


def executed_fraction(decisions: Sequence[Decision]) -> Tensor:
    """Return F / F_S of a batch, a differentiable scalar in 0..1.

    A channel that the next frame reuses counts as computed here (eq. 2's lookahead).

    Args:
        decisions: what every gated block decided in a forward pass under `frames_per_clip`.
    """
    executed = torch.stack([executed_macs(decision).mean() for decision in decisions]).sum()
    return executed / sum(sum(decision.macs) for decision in decisions)


def sparsity_loss(fraction: Tensor, target: float) -> Tensor:
    """Return (F / F_S - D)^2."""
    return (fraction - target) ** 2


def sparsity_weight(epoch: float, *, warmup: float, alpha: float, beta: float) -> float:
    """Return lambda(e): 0 before `warmup` epochs (K), then alpha exp(beta e)."""
    return 0.0 if epoch < warmup else alpha * math.exp(beta * epoch)


def mask_bounds(progress: float, *, density: float, floor: float = 0.0, ceiling: float = 1.0) -> tuple[float, float]:
    """Return the (lower, upper) bound on a mask's density at `progress` 0..1 of the relaxation.

    Both are `density` at first and move to `floor` and `ceiling` along a squared cosine (DynConv).
    """
    tight = math.cos(min(max(progress, 0.0), 1.0) * math.pi / 2) ** 2
    return floor + tight * (density - floor), ceiling - tight * (ceiling - density)


def bound_loss(decisions: Sequence[Decision], bounds: tuple[float, float]) -> Tensor:
    """Return the mean over blocks of the squared distance of the mask's density to the bounds.

    Zero if no block has a tile mask.
    """
    densities = [decision.tiles.float().mean() for decision in decisions if decision.tiles is not None]
    if not densities:
        return torch.zeros(())
    density = torch.stack(densities)
    outside = (density - bounds[1]).clamp(min=0) + (bounds[0] - density).clamp(min=0)
    return (outside**2).mean()
