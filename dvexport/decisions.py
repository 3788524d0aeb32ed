"""What gates decide: the kinds of decisions, the actions of a channel, and the names under which graphs show them.

A kind knows everything about itself that does not depend on an operator: its type, its legal values, how to draw one
at random. Which inputs or outputs of an operator hold a decision is the operator's to say (`dvexport.dialect`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

__all__ = [
    "ACTION",
    "FORCED",
    "KINDS",
    "OVER",
    "PROBE",
    "TILES",
    "TOKENS",
    "Action",
    "Key",
    "Kind",
    "decision_key",
    "forced_name",
    "probe_name",
]

Key = tuple[str, str]
"""A decision: its gate, and the name of its kind."""

PROBE, FORCED = "probe.", "force."
"""What the names of graph outputs that show a decision begin with, and of inputs that replace one."""


class Action(IntEnum):
    """What becomes of an output channel (AdaFuse, section 3; D-STEP, section 3.1)."""

    SKIP = 0
    REUSE = 1
    COMPUTE = 2


@dataclass(frozen=True)
class Kind(ABC):
    """A kind of decision.

    Attributes:
        name: in the names of probes and in `Key`.
        over: what is decided over, in the words of `--force`, reports and the manifest.
        dtype: NumPy's name of its type.
    """

    name: str
    over: str
    dtype: str

    @abstractmethod
    def problem(self, values: np.ndarray) -> str | None:
        """Return what is wrong with the values of a decision, None if they are legal."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, shape: tuple[int, ...], rate: float, among: int) -> np.ndarray:
        """Return a random decision for one frame.

        Args:
            shape: the decision's shape.
            rate: share of what is decided over that is computed, 0 to 1.
            among: how many there are to choose from; 0: as many as `shape` has.
        """


class _Actions(Kind):
    """int64 `[C]`, an `Action` for each output channel."""

    def problem(self, values: np.ndarray) -> str | None:
        legal = values.min() >= Action.SKIP and values.max() <= Action.COMPUTE
        return None if legal else "an action is 0 skip, 1 reuse or 2 compute"

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...], rate: float, among: int) -> np.ndarray:
        return np.where(_chosen(rng, shape, rate), Action.COMPUTE, Action.SKIP).astype(self.dtype)


class _Tiles(Kind):
    """bool `[gh, gw]`, which cells of the grid are active."""

    def problem(self, values: np.ndarray) -> str | None:
        return None

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...], rate: float, among: int) -> np.ndarray:
        return _chosen(rng, shape, rate)


class _Tokens(Kind):
    """int64 `[keep]`, places of the tokens that go on, in their new order; how many is fixed at export."""

    def problem(self, values: np.ndarray) -> str | None:
        return None if values.min() >= 0 else "a token has a place from 0"

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...], rate: float, among: int) -> np.ndarray:
        return rng.permutation(among)[: shape[0]].astype(self.dtype)


def _chosen(rng: np.random.Generator, shape: tuple[int, ...], rate: float) -> np.ndarray:
    """Return a mask of which exactly round(rate * n) of n are true."""
    count = int(np.prod(shape))
    chosen = np.zeros(count, bool)
    chosen[rng.permutation(count)[: round(rate * count)]] = True
    return chosen.reshape(shape)


ACTION = _Actions("action", "channels", "int64")
TILES = _Tiles("tiles", "tiles", "bool")
TOKENS = _Tokens("tokens", "tokens", "int64")
"""In profiles its name is also that of the gate which all of these decisions belong to."""

KINDS: Mapping[str, Kind] = {kind.name: kind for kind in (ACTION, TILES, TOKENS)}
"""Every kind by its name."""

OVER: Mapping[str, Kind] = {kind.over: kind for kind in KINDS.values()}
"""Every kind by what it decides over: what `--force` takes."""


def probe_name(gate: str, kind: str) -> str:
    """Return the name of the output that shows a decision."""
    return f"{PROBE}{gate}.{kind}"


def forced_name(gate: str, kind: str) -> str:
    """Return the name of the input that replaces a decision."""
    return f"{FORCED}{gate}.{kind}"


def decision_key(name: str, prefix: str) -> Key | None:
    """Return the decision that a graph's input or output is named after, None for any other name.

    Args:
        prefix: `PROBE` or `FORCED`.
    """
    if not name.startswith(prefix):
        return None
    gate, _, kind = name.removeprefix(prefix).rpartition(".")
    return gate, kind
