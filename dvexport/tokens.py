"""Which of a clip's first tokens are left after each stage of pruning.

A decision names places in its group, and a group is a part of what the stage before left, or of all tokens where
these have been merged since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dvexport.decisions import TOKENS
from dvexport.errors import UsageError

__all__ = ["HasDenseForm", "TellsTokens", "TokenStage", "survivors"]

Grid = tuple[int, int, int]
"""Tokens in time, height and width."""


class TokenStage(Protocol):
    """Where a model drops tokens; a `grid` attribute, if there is one, has the tokens that the stage begins with."""

    groups: int

    def gate(self, group: int) -> str:
        """Return the name of the gate that chooses the tokens of a group."""


@runtime_checkable
class HasDenseForm(Protocol):
    """A model that chooses tokens, and offers itself without that choice."""

    def without_pruning(self) -> Any:
        """Return the same model, same weights, as it is without token pruning."""


@runtime_checkable
class TellsTokens(Protocol):
    """A model that tells where its tokens lie, so that decisions can be shown on frames.

    Attributes:
        token_grid: first tokens in time, height and width.
        token_groups: its stages in order; none if it drops nothing.
    """

    token_grid: Grid
    token_groups: Sequence[TokenStage]


def survivors(
    grid: Grid,
    stages: Sequence[Sequence[str]],
    decisions: Mapping[tuple[str, str], np.ndarray],
    grids: Sequence[Grid | None] = (),
) -> list[np.ndarray]:
    """Return for each stage where tokens are left: bool, of the shape of its grid.

    Args:
        grid: first tokens in time, height and width.
        stages: for each stage the gates of its groups, in the order of time; groups are of equal size.
        decisions: the decisions of one clip, kind `tokens`.
        grids: for each stage None, or the grid of the tokens it begins with, where they were merged before it.

    Raises:
        UsageError: a decision is missing, or does not fit its group.
    """
    places = np.arange(prod(grid))
    found = []
    for gates, merged in zip(stages, grids or [None] * len(stages), strict=True):
        if merged is not None:
            grid, places = merged, np.arange(prod(merged))
        if not gates or len(places) % len(gates):
            raise UsageError(f"{len(places)} tokens can't be divided into {len(gates)} groups")
        kept = []
        for group, gate in zip(places.reshape(len(gates), -1), gates, strict=True):
            chosen = decisions.get((gate, TOKENS.name))
            if chosen is None or (len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(group)):
                raise UsageError("a decision over tokens is missing, or outside its group", where=gate)
            kept.append(group[chosen])
        places = np.concatenate(kept)
        left = np.zeros(prod(grid), bool)
        left[places] = True
        found.append(left.reshape(grid))
    return found
