"""What a piece of advice is: a fact about a profile, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum

from dvexport.profile.result import ProfileResult

__all__ = ["WIDE_SPREAD", "Advice", "AdviceKind", "Rule", "unreliable"]

WIDE_SPREAD = 0.15
"""Interquartile range over median above which a median is not trusted."""


class AdviceKind(StrEnum):
    """What a piece of advice is about; scripts read this, people its text."""

    OTHER_PROCESSOR = "other-processor"
    """Measured on another kind of processor than the bundle is made for."""
    NO_DENSE = "no-dense"
    SLOWER = "slower-than-dense"
    """The whole gated artifact takes longer than the dense one."""
    LITTLE_ARRIVES = "little-arrives"
    """It is faster, but most of the speed-up that the decisions allow is lost."""
    FORCED = "forced"
    UNRELIABLE = "unreliable"
    """Steps of equal work take unequal time. No gate is judged by its times then."""
    VARIED = "varied-work"
    """Gated steps spread, dense ones do not."""
    COSTLY = "gate-costs-more"
    """A gate takes longer than the same layers in the dense artifact."""
    LOSSY = "gate-saves-less"
    """A gate saves time, but much less than its FLOPs allow, and another lowering promises more."""
    UNUSED = "saving-unused"
    """The lowering of a gate computes what its decisions leave out."""
    NEVER_SKIPS = "never-skips"
    ALWAYS_SKIPS = "always-skips"
    DECIDING = "deciding-costs"
    """Policies, masks or the choice of tokens take a large share of a step."""
    OUTSIDE = "outside-of-gates"
    """Layers that belong to no gate take a large share of a step."""
    NO_GATES = "no-gates"
    """The dense artifact is the same network."""
    NOTHING = "nothing"
    """Nothing stands out."""


@dataclass(frozen=True)
class Advice:
    """One piece of advice.

    Attributes:
        kind: what it is about.
        severity: `warning`, `hint` or `info`.
        gate: the gate that it is about; None: the whole, or several gates.
        text: what was found, for people.
        act: what to do about it; empty only where nothing stands out.
        lowering: what the gate is proposed to be lowered as instead; None: nothing else.
    """

    kind: AdviceKind
    severity: str
    gate: str | None
    text: str
    act: str
    lowering: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """Return the JSON form."""
        return asdict(self)


Rule = Callable[[ProfileResult], Iterator[Advice]]


def unreliable(result: ProfileResult) -> float | None:
    """Return by how much steps of equal work spread, where that is too much to trust a time; None elsewhere.

    A dense step does the same work each time, so its spread is the machine's alone; so does one over a clip.
    """
    spread = (result.dense or result.gated).spread
    if result.whole_clip:
        spread = max(spread, result.gated.spread)
    return spread if spread > WIDE_SPREAD else None
