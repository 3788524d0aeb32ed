"""Multiply-accumulates of one gated convolution, as a function of what its gate and that of its input decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from dvexport.decisions import ACTION, TILES, Action
from dvexport.dialect.masks import tile_index

__all__ = ["Decisions", "GatedMacs"]

Decisions = Mapping[tuple[str, str], np.ndarray]
"""One frame's decisions by (gate, `action` or `tiles`): int `[C]` and bool `[gh, gw]`; a leading 1 is allowed.
Those over tokens change no count: how many go on is fixed."""


@dataclass(frozen=True)
class GatedMacs:
    """One gated convolution.

    Attributes:
        gate, node: its gate and its name.
        cin, cout, taps: channels and kernel area.
        size: output plane, pixels.
        acts: its outputs follow the gate's actions.
        reads: the gate whose actions say which of its input channels are not zero; empty: all are read.
        tiled: it computes only active tiles.
    """

    gate: str
    node: str
    cin: int
    cout: int
    taps: int
    size: tuple[int, int]
    acts: bool
    reads: str
    tiled: bool

    @property
    def dense(self) -> int:
        """MACs of the whole convolution on one frame."""
        return self.cin * self.cout * self.taps * prod(self.size)

    def executed(self, now: Decisions, before: Decisions | None) -> int:
        """Return the MACs of one frame; `before` is the previous frame's, None for the first."""
        tiles = self._tiles(now)
        pixels = self._pixels(tiles)
        if not self.acts:
            return self._inputs(now) * self.cout * self.taps * pixels
        action = self._action(now)
        total = int((action == Action.COMPUTE).sum()) * pixels * self._inputs(now)
        if before is not None:
            was_kept = self._action(before) == Action.COMPUTE
            stale = tiles & ~self._tiles(before)
            owed = int(((action == Action.REUSE) & ~was_kept).sum()) * pixels
            owed += int(((action == Action.REUSE) & was_kept).sum()) * self._pixels(stale)
            total += owed * self._inputs(before)
        return total * self.taps

    def _action(self, decisions: Decisions) -> np.ndarray:
        return np.asarray(decisions[self.gate, ACTION.name]).reshape(-1)

    def _inputs(self, decisions: Decisions) -> int:
        """How many input channels the reduction runs over."""
        if not self.reads:
            return self.cin
        return int((np.asarray(decisions[self.reads, ACTION.name]) != Action.SKIP).sum())

    def _tiles(self, decisions: Decisions) -> np.ndarray:
        if not self.tiled:
            return np.ones((1, 1), bool)
        tiles = np.asarray(decisions[self.gate, TILES.name]).astype(bool)
        return tiles.reshape(tiles.shape[-2:])

    def _pixels(self, tiles: np.ndarray) -> int:
        rows = np.bincount(tile_index(self.size[0], tiles.shape[0]), minlength=tiles.shape[0])
        columns = np.bincount(tile_index(self.size[1], tiles.shape[1]), minlength=tiles.shape[1])
        return int(rows @ tiles @ columns)
