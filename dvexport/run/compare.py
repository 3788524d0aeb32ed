"""Compare two runs of one clip: outputs by their error, decisions by how many differ.

The error of an output is the largest difference over the spread. The spread is the distance from the least to the
greatest value of the reference over the clip, so logits, maps and boxes in pixels need no case of their own. A spread
below a hundredth of the greatest magnitude counts as that hundredth, since float32 rounds by the magnitude. For whole
numbers and truth values, the error is the share that differs. `dvexport.bundle.limits` has the limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dvexport.bundle.limits import Limits
from dvexport.decisions import KINDS, TOKENS
from dvexport.run.session import Step

__all__ = [
    "Row",
    "compare",
    "decision_rows",
    "first_difference",
    "output_error",
    "output_rows",
]

_LEAST_SPREAD = 1e-2
"""The least spread of an output, as a share of the greatest magnitude."""


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


def compare(name: str, got: Sequence[Step], want: Sequence[Step], limits: Limits) -> list[Row]:
    """Return the rows that compare two runs of one clip, as many frames each."""
    return [*output_rows(name, got, want, limits), *decision_rows(name, got, want, limits)]


def output_rows(name: str, got: Sequence[Step], want: Sequence[Step], limits: Limits | None) -> list[Row]:
    """Return one row for each output that either side gives; without limits nothing may differ."""
    names = list(dict.fromkeys(output for step in (*want[:1], *got[:1]) for output in step.outputs))
    return [
        error_row(f"{name}: {output}", output_error(output, got, want), 0.0 if limits is None else limits.of(output))
        for output in names
    ]


def error_row(name: str, error: float, limit: float) -> Row:
    """Return the row of an error; one that is no number fails."""
    return Row(name, error, limit, bool(error <= limit))


def output_error(output: str, got: Sequence[Step], want: Sequence[Step]) -> float:
    """Return the largest difference over the spread of `want`; infinite for other shapes or types, or none at all."""
    sides = [[step.outputs[output] for step in steps if output in step.outputs] for steps in (got, want)]
    if not all(sides) or len({(value.shape, value.dtype.kind) for side in sides for value in side}) != 1:
        return float("inf")
    mine, theirs = (np.stack(side) for side in sides)
    if mine.shape != theirs.shape:
        return float("inf")
    if mine.dtype.kind != "f":
        return float(np.mean(mine != theirs)) if mine.size else 0.0
    mine, theirs = mine.astype(np.float64), theirs.astype(np.float64)
    spread = max(float(np.ptp(theirs)), _LEAST_SPREAD * float(np.abs(theirs).max()))
    difference = float(np.abs(mine - theirs).max())
    return difference / spread if spread > 0 else difference


def decision_rows(name: str, got: Sequence[Step], want: Sequence[Step], limits: Limits) -> list[Row]:
    """Return the rows that count differing decisions, tokens apart; none where a side shows no decisions."""
    rows = []
    found = list(_differences(got, want))
    for what, among in (("decisions", [d for d in found if d[2] != TOKENS.name]),
                        (TOKENS.over, [d for d in found if d[2] == TOKENS.name])):  # fmt: skip
        total, differing = sum(d[4] for d in among), sum(d[3] for d in among)
        if not total:
            continue
        limit = max(2, int(total * limits.tokens)) if what == TOKENS.over else int(total * limits.decisions)
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
    for frame, (mine, theirs) in enumerate(zip(got, want, strict=False)):  # runs of other lengths fail by their outputs
        for (gate, kind), value in mine.decisions.items():
            other = theirs.decisions.get((gate, kind))
            if other is not None:
                differing = np.count_nonzero(value != other) if value.shape == other.shape else value.size
                yield frame, gate, kind, int(differing), value.size
