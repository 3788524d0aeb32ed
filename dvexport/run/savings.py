"""What an artifact's gates leave out on its golden frames: how much they could, and how much their lowerings do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dvexport.bundle.archive import Bundle
from dvexport.bundle.manifest import GateEntry
from dvexport.decisions import ACTION, TILES, TOKENS, Action
from dvexport.dialect.flops import FlopTable
from dvexport.passes.lowerings import LOWERINGS
from dvexport.run.golden import unpack
from dvexport.run.session import Decisions

__all__ = ["Savings", "savings_of"]


@dataclass(frozen=True)
class Savings:
    """The share of the dense model's multiply-accumulates that an artifact leaves out.

    Attributes:
        asked: what the decisions on the golden frames would leave out, 0 to 1; below 0 where deciding costs more.
        kept: what is left of that in this artifact, by how its gates are lowered.
        gates: number of gates.
        idle: names of those whose lowering computes everything, whatever they decide.
    """

    asked: float
    kept: float
    gates: int
    idle: tuple[str, ...]


def savings_of(bundle: Bundle) -> Savings | None:
    """Return what a bundle saves on its golden frames, None if its model has no gates."""
    manifest = bundle.manifest
    if not manifest.gates:
        return None
    table = FlopTable.from_dict(manifest.flops)
    _, steps = unpack(
        bundle.golden(), [port.name for port in manifest.inputs], [port.name for port in manifest.declared_outputs]
    )
    taken = [step.decisions for step in steps]
    followed = [{key: value for gate in manifest.gates for key, value in _followed(gate, one)} for one in taken]
    idle = tuple(gate.name for gate in manifest.gates if _follows(gate) == ())
    return Savings(_saved(table, taken), _saved(table, followed), len(manifest.gates), idle)


def _saved(table: FlopTable, decisions: Sequence[Decisions]) -> float:
    return 1 - float(np.mean(table.executed(decisions).frames)) / table.dense if table.dense else 0.0


def _follows(gate: GateEntry) -> tuple[str, ...]:
    """Return the kinds of decisions that a gate's lowering follows: of kernels and of token gates all."""
    lowering = LOWERINGS.get(gate.lowering)
    if lowering is None:
        return (ACTION.name, TILES.name, TOKENS.name)
    return (lowering.follows,) if lowering.follows else ()


def _followed(gate: GateEntry, decisions: Decisions) -> list[tuple[tuple[str, str], np.ndarray]]:
    """Return what a gate decided as its lowering takes it: everything, where it follows no decision of the kind."""
    everything = {ACTION.name: int(Action.COMPUTE), TILES.name: 1}
    return [
        ((name, kind), value if kind in _follows(gate) else np.full_like(value, everything[kind]))
        for (name, kind), value in decisions.items()
        if name == gate.name
    ]
