"""Tokens dropped at random: what STA's choice is compared with. As many go, the same ones of every clip."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dvexport import gates

if TYPE_CHECKING:
    from dvexport.models.pruning.pruning_stage import PruningStage

__all__ = ["drop_at_random", "random_scores"]


def random_scores(stage: PruningStage, seed: int) -> np.ndarray:
    """Return scores drawn once, float32 `[groups, 1, tokens]`."""
    draw = np.random.default_rng([seed, stage.call])
    return draw.random((stage.groups, 1, stage.tokens), dtype=np.float32)


def drop_at_random(x: Tensor, stage: PruningStage, scores: np.ndarray) -> tuple[Tensor, list[Tensor]]:
    """Return what `sta.select_survivors` does of tokens `[B, groups * tokens, C]`, chosen by `random_scores`."""
    kept = []
    for group, tokens in enumerate(x.split(stage.tokens, dim=1)):
        score = torch.tensor(scores[group], device=x.device).expand(x.shape[0], -1)
        kept.append(gates.select_tokens(tokens, score, stage.keep, gate=stage.gate(group)))
    return torch.cat([tokens for tokens, _ in kept], dim=1), [index for _, index in kept]
