"""Compare the forced variant of an artifact with its references, and find the gate that is to blame if they differ."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dvexport.bundle.limits import Limits
from dvexport.errors import CheckFailed
from dvexport.passes.expose_probes import used_elsewhere
from dvexport.run.compare import Row, output_rows
from dvexport.run.feeds import Given, at
from dvexport.run.forced import ForcedRun
from dvexport.run.golden import torch_forced
from dvexport.run.oracle import Oracle
from dvexport.run.session import Decisions, Session, Step, stacked_outputs

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

__all__ = [
    "NOT_FORCED", "ForcedCheck", "Reference", "check_forced", "guilty_gate", "not_equal", "references_of",
    "verified_runs",
]  # fmt: skip

Reference = Callable[[ForcedRun], Sequence[Step]]
"""Gives the steps of a run, as a witness computes them."""

ORACLE, TORCH = "gate-level oracle", "PyTorch"

NOT_FORCED = "no gate was exercised by forced decisions: the bundle holds none"
"""What is told of a bundle without forced runs: one of before there were any, or of a model that has no use of them."""


@dataclass(frozen=True)
class ForcedCheck:
    """What a comparison over forced steps gave.

    Attributes:
        rows: by reference, one for each output.
        want: what each reference gives, run by run.
        decisions: those of the steps that were compared, run by run.
        left_out: how many were not: the model itself has no finite result under their decisions.
    """

    rows: dict[str, list[Row]]
    want: dict[str, list[list[Step]]]
    decisions: list[list[Decisions]]
    left_out: int

    def note(self, references: Collection[str]) -> str | None:
        """Return what could not be compared, None where all was."""
        told = [f"not compared with {name} under forced decisions: it can't be made to follow all of them"
                for name in references if name not in self.want]  # fmt: skip
        if self.left_out:
            told.append(f"{self.left_out} forced steps were left out: the model has no finite result in them")
        return "; ".join(told) or None


def references_of(gate_level: ir.Model, frames: Given, net: nn.Module | None) -> dict[str, Reference]:
    """Return what forced runs over the golden frames are compared with: the oracle, and PyTorch where it is at hand.

    PyTorch is left out for a run in which it can't be made to follow: a decision that no call of torch was seen to
    make, and that the model uses outside its gated convolutions.
    """
    oracle, elsewhere = Oracle(gate_level, forced=True), used_elsewhere(gate_level)
    found: dict[str, Reference] = {ORACLE: lambda run: oracle.run_forced(at(frames, run.frames), run.decisions)}
    if net is None:
        return found

    def torch_run(run: ForcedRun) -> Sequence[Step]:
        steps, unseen = torch_forced(net, at(frames, run.frames), run.decisions)
        return [] if unseen & elsewhere else steps

    return {**found, TORCH: torch_run}


def verified_runs(
    session: Session, traced: ir.Model, net: nn.Module, frames: Given, runs: Sequence[ForcedRun], limits: Limits
) -> tuple[list[ForcedRun], list[list[Decisions]]]:
    """Return the runs with what PyTorch gives, once the artifact gave the same; and the decisions that were compared.

    The oracle stands in for PyTorch where that can't be made to follow.

    Raises:
        CheckFailed: the artifact does not compute what the model does.
    """
    references = references_of(traced, frames, net)
    found = check_forced(session, runs, frames, references, limits)
    for name, rows in found.rows.items():
        if failed := [row for row in rows if not row.ok]:
            gate = guilty_gate(session, runs, frames, references[name], limits)
            raise not_equal(failed[0], None if gate is None else f"gate '{gate}'")
    witness = found.want.get(TORCH, found.want[ORACLE])
    told = [run.with_outputs(stacked_outputs(want)) for run, want in zip(runs, witness, strict=True)]
    return told, found.decisions


def not_equal(row: Row, where: object) -> CheckFailed:
    """Return the error of an artifact that is not written: `row` failed, at `where` if that is known."""
    return CheckFailed(
        "the artifact does not compute what the model does; no bundle was written",
        where=str(where) if where else row.name,
        why=f"{row.name}: {row.value:.3g}, at most {row.limit:.3g} is allowed",
        hint="try --lowering '*=masked'; if that passes, please report the lowering that fails",
    )


def check_forced(
    session: Session, runs: Sequence[ForcedRun], frames: Given, references: Mapping[str, Reference], limits: Limits
) -> ForcedCheck:
    """Compare a session of the forced variant with each reference.

    Args:
        frames: the golden frames, which the runs name.
        references: by name; the first decides which steps have a finite result. One that gives no step is left out.

    Raises:
        UsageError, DeviceError: as `Session.run_clip`.
    """
    got = [session.run_clip(at(frames, run.frames), run.decisions) for run in runs]
    want = {name: [list(reference(run)) for run in runs] for name, reference in references.items()}
    want = {name: steps for name, steps in want.items() if all(steps)}
    finite = [_finite(steps) for steps in next(iter(want.values()))]
    rows = {}
    for name, steps in want.items() if any(finite) else ():
        mine, theirs = (
            [step for run, n in zip(side, finite, strict=True) for step in run[:n]] for side in (got, steps)
        )
        rows[name] = output_rows(f"forced decisions, {name}", mine, theirs, limits)
    decisions = [list(run.decisions[:n]) for run, n in zip(runs, finite, strict=True)]
    return ForcedCheck(rows, want, decisions, sum(len(run.decisions) for run in runs) - sum(finite))


def guilty_gate(
    session: Session, runs: Sequence[ForcedRun], frames: Given, reference: Reference, limits: Limits
) -> str | None:
    """Return the first gate that differs from the reference while all others compute all; None if none does alone."""
    steps = [given for run in runs for given in run.decisions]
    everything = steps[min(1, len(steps) - 1)]
    for gate in dict.fromkeys(gate for gate, _ in everything):
        alone = [replace(run, decisions=[_only(gate, given, everything) for given in run.decisions]) for run in runs]
        found = check_forced(session, alone, frames, {gate: reference}, limits)
        if not all(row.ok for rows in found.rows.values() for row in rows):
            return gate
    return None


def _only(gate: str, given: Decisions, others: Decisions) -> Decisions:
    return {key: value if key[0] == gate else others[key] for key, value in given.items()}


def _finite(steps: Sequence[Step]) -> int:
    """Return how many steps have a finite result before the first that has none.

    A model that always leaves something to compute may divide by how much that is: forced to nothing it has no result.
    """
    finite = [all(np.isfinite(value).all() for value in step.outputs.values()) for step in steps]
    return len(finite) if all(finite) else finite.index(False)
