"""One stage of token pruning: which tokens it divides, and how many of them go on."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PruningStage"]


@dataclass(frozen=True)
class PruningStage:
    """One place where tokens are dropped. Tokens `[B, groups * tokens, C]` become `[B, groups * keep, C]`.

    The decision `sta.CALL.GROUP` holds the places in the group of the tokens that stay. To map them to
    the first tokens: places = arange(all); at each stage, reshape them to `(groups, tokens)`, take the
    decision's in each group, and join.

    Attributes:
        call: 0 for the first place, and so on.
        block: after which block, 0-based.
        groups: groups of adjacent frames.
        tokens: tokens of a group before.
        keep: tokens of a group after.
        direction: `forward` or `reverse`.
        grid: tokens in time, height and width where the model has merged tokens since the last place, and this one
            chooses from all of them; None: from those that the last place left.
    """

    call: int
    block: int
    groups: int
    tokens: int
    keep: int
    direction: str
    grid: tuple[int, int, int] | None = None

    def gate(self, group: int) -> str:
        """Return the name of a group's decision; groups are counted in the order of time."""
        return f"sta.{self.call}.{group}"
