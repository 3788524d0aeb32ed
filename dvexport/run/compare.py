"""Compare two runs of one clip: logits by their error, decisions by how many differ.

Limits. Lowerings compute the same sums in another order, and Winograd's F(4, 3) loses about 1e-5
of the largest value per convolution; over some twenty of them that stays below 1e-4. `LOGITS_LIMIT` leaves
a factor of ten above it, and still is far below what moves a probability by a per cent. A decision is a
comparison, so one that hangs on the last bit may fall either way in exact arithmetic's neighbourhood:
`DECISIONS_LIMIT` allows one in ten thousand, none at all below that many decisions. Tokens are put in order by
scores that lie close together, some of them closer than two programs round: where both sides follow the same
tokens, so that no swap reaches what is decided later, `TOKENS_LIMIT` of the places may hold another token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dvexport.decisions import KINDS, TOKENS
from dvexport.run.session import Step

__all__ = [
    "DECISIONS_LIMIT",
    "LOGITS_LIMIT",
    "TOKENS_LIMIT",
    "Row",
    "compare",
    "decision_rows",
    "first_difference",
    "logits_error",
]

LOGITS_LIMIT = 1e-3
"""Largest error of a logit, over the largest logit of the clip."""
DECISIONS_LIMIT = 1e-4
"""Share of the decisions that may differ, rounded down to whole decisions."""


TOKENS_LIMIT = 1e-2
"""Share of the places in the order of tokens that may hold another token; at least two, which is one swap."""


class Row(NamedTuple):
    """One check: it holds where `value` is at most `limit`."""

    name: str
    value: float
    limit: float
    ok: bool


@dataclass(frozen=True)
class Difference:
    """The first decision that differs, in the order of frames, then of gates."""

    frame: int
    gate: str
    kind: str
    count: int
    total: int

    def __str__(self) -> str:
        decided = f"{self.count} of {self.total} {KINDS[self.kind].over} decided otherwise"
        return f"gate '{self.gate}', frame {self.frame}: {decided}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return dict(self.__dict__)


def compare(name: str, got: Sequence[Step], want: Sequence[Step]) -> list[Row]:
    """Return the rows that compare two runs of one clip, as many frames each."""
    return [error_row(f"{name}: logits", logits_error(got, want)), *decision_rows(name, got, want)]


def error_row(name: str, error: float, limit: float = LOGITS_LIMIT) -> Row:
    """Return the row of an error; one that is no number fails."""
    return Row(name, error, limit, bool(error <= limit))


def logits_error(got: Sequence[Step], want: Sequence[Step]) -> float:
    """Return the largest absolute difference over the largest absolute logit of `want`; infinite for other shapes."""
    mine, theirs = (np.stack([step.logits for step in steps]).astype(np.float64) for steps in (got, want))
    if mine.shape != theirs.shape:
        return float("inf")
    scale = float(np.abs(theirs).max())
    difference = float(np.abs(mine - theirs).max())
    return difference / scale if scale > 0 else difference


def decision_rows(name: str, got: Sequence[Step], want: Sequence[Step]) -> list[Row]:
    """Return the rows that count differing decisions, tokens apart; none where a side shows no decisions."""
    rows = []
    found = list(_differences(got, want))
    for what, among in (("decisions", [d for d in found if d[2] != TOKENS.name]),
                        (TOKENS.over, [d for d in found if d[2] == TOKENS.name])):  # fmt: skip
        total, differing = sum(d[4] for d in among), sum(d[3] for d in among)
        if not total:
            continue
        limit = max(2, int(total * TOKENS_LIMIT)) if what == TOKENS.over else int(total * DECISIONS_LIMIT)
        rows.append(Row(f"{name}: {what} that differ, of {total}", differing, limit, differing <= limit))
    return rows


def first_difference(got: Sequence[Step], want: Sequence[Step]) -> Difference | None:
    """Return the first frame and gate where the runs decided otherwise, None if they never did."""
    for frame, gate, kind, count, total in _differences(got, want):
        if count:
            return Difference(frame, gate, kind, count, total)
    return None


def _differences(got: Sequence[Step], want: Sequence[Step]):
    """Yield (frame, gate, kind, differing, total) for every decision that both sides show."""
    for frame, (mine, theirs) in enumerate(zip(got, want, strict=False)):  # of other lengths: failed by their logits
        for (gate, kind), value in mine.decisions.items():
            other = theirs.decisions.get((gate, kind))
            if other is not None:
                differing = np.count_nonzero(value != other) if value.shape == other.shape else value.size
                yield frame, gate, kind, int(differing), value.size
