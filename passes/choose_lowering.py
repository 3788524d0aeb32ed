"""Choose how each gate is lowered, from what the target can do and a measured cost table.

A gate's expected cost under a lowering is a sum over its convolutions. Each adds the time measured on the target for
the nearest shape, scaled by multiply-accumulates. Times are interpolated at the gate's expected rate (share of tiles or
of channels computed). The cheapest legal lowering wins; masking everything
is always legal, so a gate that would cost more than it saves falls back to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from dvexport.errors import UsageError, unknown_name
from dvexport.graph.graph import gate_name
from dvexport.passes.lowerings import LOWERINGS, MASKED, Abilities, CostTable, Shares, choose, takes_lowering

__all__ = ["Choice", "ChooseLowering"]


@dataclass(frozen=True)
class Choice:
    """What was chosen for a gate and why; `expected_ms` by lowering, of one frame."""

    gate: str
    lowering: str
    reason: str
    overridden: bool = False
    expected_ms: Mapping[str, float] = field(default_factory=dict)


class ChooseLowering(ir.passes.InPlacePass):
    """Mark every node of every gate with its lowering.

    Args:
        abilities: the target's.
        costs: its measured table; None chooses by ability alone, and says so.
        rates: expected rates by gate, from calibration; others are taken as one half.
        overrides: lowering by gate, or by `*` for all that allow it.

    Requires: gate level, frames fixed. Afterwards `choices` has one entry a gate.

    Raises:
        UsageError: an override names an unknown gate or lowering, or one that is not legal there.
    """

    def __init__(
        self,
        abilities: Abilities,
        costs: CostTable | None = None,
        rates: Mapping[str, Shares] | None = None,
        overrides: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.abilities, self.costs = abilities, costs
        self.rates, self.overrides = rates or {}, overrides or {}
        self.choices: list[Choice] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Choose gate by gate."""
        gates: dict[str, list[ir.Node]] = {}
        for node in model.graph:
            if takes_lowering(node):
                gates.setdefault(gate_name(node), []).append(node)
        self._check_overrides(gates)
        for gate, nodes in gates.items():
            choice = self._choose(gate, nodes)
            self.choices.append(choice)
            for node in nodes:
                choose(node, choice.lowering)
        return ir.passes.PassResult(model, bool(gates))

    def _check_overrides(self, gates: Mapping[str, list[ir.Node]]) -> None:
        for gate, lowering in self.overrides.items():
            if gate != "*" and gate not in gates:
                raise unknown_name("gate", gate, gates)
            if lowering not in LOWERINGS:
                raise unknown_name("lowering", lowering, LOWERINGS)

    def _choose(self, gate: str, nodes: list[ir.Node]) -> Choice:
        illegal = {name: each.why_not(nodes, self.abilities) for name, each in LOWERINGS.items()}
        legal = [name for name, why in illegal.items() if why is None]
        asked = self.overrides.get(gate)
        if asked is not None and illegal[asked]:
            raise UsageError(f"gate '{gate}' can't be lowered as '{asked}'", why=illegal[asked],
                             hint=f"one of: {', '.join(legal)}")  # fmt: skip
        asked = asked or (self.overrides.get("*") if self.overrides.get("*") in legal else None)
        expected = {name: ms for name in legal if (ms := self._expected(name, gate, nodes)) is not None}
        if asked:
            return Choice(gate, asked, "asked for", True, expected)
        if len(legal) == 1:
            first = next(why for why in illegal.values() if why)
            return Choice(gate, MASKED, f"nothing else is possible: {first}", False, expected)
        if MASKED not in expected or len(expected) == 1:
            best = next(name for name in legal if LOWERINGS[name].fallback)
            return Choice(gate, best, "no measured costs for this target: the usual best", False, expected)
        best = min(expected, key=lambda name: (expected[name], name != MASKED))
        return Choice(gate, best, self._reason(best, gate, expected), False, expected)

    def _expected(self, lowering: str, gate: str, nodes: list[ir.Node]) -> float | None:
        if self.costs is None:
            return None
        return LOWERINGS[lowering].expected(nodes, self.rates.get(gate, Shares()), self.costs)

    def _reason(self, best: str, gate: str, expected: Mapping[str, float]) -> str:
        known = "calibrated" if gate in self.rates else "assumed"
        rates = self.rates.get(gate, Shares())
        at = f"{known}: {rates.tiles:.0%} of tiles, {rates.active:.0%} of channels"
        rest = [name for name in expected if name != best]
        others = ", ".join(f"{name} {expected[name]:.2f}" for name in sorted(rest, key=lambda n: expected[n])[:2])
        saved = "every other lowering costs more than it saves; " if best == MASKED else ""
        return f"{saved}{expected[best]:.2f} ms expected, {others} ({at})"
