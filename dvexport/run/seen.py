"""What was seen of each gate: on a clip, and in steps with forced decisions.

A comparison says nothing of what never happened in it. So it is counted in how many frames a gate computed, reused,
skipped, reused what was stale, and had no, some or all of its tiles active.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dvexport.bundle.manifest import GateEntry, Seen, SeenFrames
from dvexport.decisions import ACTION, TILES, TOKENS, Action
from dvexport.run.session import Decisions, Step

__all__ = ["EVENTS", "GateSeen", "gates_seen", "seen_in", "titles", "with_seen"]

EVENTS = {
    "channels": {"computed": "computed", "reused": "reused", "skipped": "skipped", "stale": "stale reused"},
    "tiles": {"no_tiles": "no tile", "some_tiles": "some tiles", "all_tiles": "all tiles", "new_tiles": "new tiles"},
    "tokens": {"chosen": "tokens"},
}
"""What can be seen of a gate, by what it decides over: fields of `SeenFrames`, and how they are called in tables."""
_ALL = [event for kind in EVENTS.values() for event in kind]


@dataclass(frozen=True)
class GateSeen:
    """A gate, its kind as the manifest has it, and what was seen of it."""

    gate: str
    kind: str
    seen: Seen

    @property
    def events(self) -> list[str]:
        """What can be seen of a gate of its kind: fields of `SeenFrames`."""
        return [event for kind in self.kind.split("+") for event in EVENTS.get(kind, ())]

    @property
    def missing(self) -> list[str]:
        """What was seen of the gate neither on a clip nor in forced steps."""
        both = [part for part in (self.seen.clip, self.seen.forced) if part is not None]
        return [event for event in self.events if not any(getattr(part, event) for part in both)]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"gate": self.gate, "kind": self.kind, **self.seen.model_dump(mode="json"), "missing": self.missing}


def seen_in(gate: GateEntry, runs: Sequence[Sequence[Decisions]]) -> SeenFrames:
    """Count over runs, each from its first frame, what a gate decided."""
    counts = dict.fromkeys(_ALL, 0)
    for run in runs:
        before: Decisions | None = None
        for decisions in run:
            for event in _events(gate.name, decisions, before):
                counts[event] += 1
            before = decisions
    return SeenFrames(frames=sum(len(run) for run in runs), **counts)


def with_seen(
    gates: Sequence[GateEntry], clip: Sequence[Step], forced: Sequence[Sequence[Decisions]] | None
) -> list[GateEntry]:
    """Return the gates with what a clip and forced runs showed of them; None for no forced runs."""
    own = [[step.decisions for step in clip]]
    return [
        gate.model_copy(
            update={"seen": Seen(clip=seen_in(gate, own), forced=None if forced is None else seen_in(gate, forced))}
        )
        for gate in gates
    ]


def titles(events: Sequence[str]) -> list[str]:
    """Return what events are called in tables."""
    named = {event: title for kind in EVENTS.values() for event, title in kind.items()}
    return [named[event] for event in events]


def gates_seen(
    gates: Sequence[GateEntry], clip: Sequence[Step], forced: Sequence[Sequence[Decisions]] | None
) -> tuple[GateSeen, ...]:
    """Return what a clip and forced runs showed of each gate; None for no forced runs."""
    told = with_seen(gates, clip, forced)
    return tuple(GateSeen(gate.name, gate.kind, gate.seen) for gate in told if gate.seen is not None)


def _events(gate: str, now: Decisions, before: Decisions | None) -> list[str]:
    action, tiles = now.get((gate, ACTION.name)), now.get((gate, TILES.name))
    found = ["chosen"] if (gate, TOKENS.name) in now else []
    if action is not None:
        active = tiles is None or bool(tiles.any())
        found += ["skipped"] if (action == Action.SKIP).any() else []
        found += [
            name
            for name, kind in (("computed", Action.COMPUTE), ("reused", Action.REUSE))
            if active and (action == kind).any()
        ]
        found += ["stale"] if before is not None and _stale(gate, action, tiles, before) else []
    if tiles is not None:
        count = int(np.count_nonzero(tiles))
        found.append("no_tiles" if not count else "all_tiles" if count == tiles.size else "some_tiles")
        found += ["new_tiles"] if before is not None and (tiles & ~before[gate, TILES.name]).any() else []
    return found


def _stale(gate: str, action: np.ndarray, tiles: np.ndarray | None, before: Decisions) -> bool:
    """Tell whether a frame reuses, where it is active, what the frame before left out: a channel, or a tile."""
    reused = action == Action.REUSE
    if not reused.any() or (tiles is not None and not tiles.any()):
        return False
    new_tiles = tiles is not None and bool((tiles & ~before[gate, TILES.name]).any())
    return new_tiles or bool((reused & (before[gate, ACTION.name] != Action.COMPUTE)).any())
