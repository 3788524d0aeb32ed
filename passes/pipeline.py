"""The order of the passes: those that every backend shares, then the backend's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import onnx_ir as ir

from dvexport.errors import DvexportError, PassError, unknown_name
from dvexport.names import MODES
from dvexport.passes.check_dialect import CheckDialect
from dvexport.passes.choose_lowering import Choice
from dvexport.passes.clean_up import CleanUp
from dvexport.passes.drop_gates import DropGates
from dvexport.passes.expose_probes import ExposeProbes, ForceDecisions
from dvexport.passes.fold_scores import FoldScores
from dvexport.passes.group_channels import ChannelStatistics
from dvexport.passes.lower_masked import LowerMasked
from dvexport.passes.lowerings import Abilities, CostTable, Shares
from dvexport.passes.mark_decisions import MarkDecisions
from dvexport.passes.propagate_inactive import PropagateInactive
from dvexport.passes.set_frames import SetClip, SetStream
from dvexport.passes.share_pooling import SharePooling
from dvexport.passes.simplify import Simplify

__all__ = ["BackendPasses", "Chooser", "Lowered", "PassRecord", "Request", "lower"]

VARIANTS = ("gated", "dense", "masked")


@dataclass(frozen=True)
class Request:
    """What to make of a traced model.

    Attributes:
        mode: `stream` (one frame a step, explicit state) or `clip`.
        frames: frames of a clip; ignored in stream mode.
        variant: `gated`, what is shipped; `dense`, no gates at all; `masked`, all work then masks.
        forced: take decisions from inputs (`expose_probes.forced_name`) instead of from the gates.
        abilities, costs, rates, overrides: see `ChooseLowering`.
        statistics: channel actions seen in calibration, by gate, for `GroupChannels`.
    """

    mode: str = "stream"
    frames: int = 8
    variant: str = "gated"
    forced: bool = False
    abilities: Abilities = field(default_factory=Abilities)
    costs: CostTable | None = None
    rates: Mapping[str, Shares] = field(default_factory=dict)
    overrides: Mapping[str, str] = field(default_factory=dict)
    statistics: Mapping[str, ChannelStatistics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """UsageError on a mode or variant that is none."""
        for kind, value, known in (("mode", self.mode, MODES), ("variant", self.variant, VARIANTS)):
            if value not in known:
                raise unknown_name(kind, value, known)


@dataclass(frozen=True)
class PassRecord:
    """What a pass did: node counts and seconds."""

    name: str
    nodes_before: int
    nodes_after: int
    seconds: float


@runtime_checkable
class Chooser(Protocol):
    """A pass that decides what becomes of every gate.

    Attributes:
        choices: what it chose, once it ran.
    """

    choices: list[Choice]


@dataclass
class Lowered:
    """A model of operators that the backend has, with what was decided on the way."""

    model: ir.Model
    choices: list[Choice]
    log: list[PassRecord]


@dataclass(frozen=True)
class BackendPasses:
    """What a backend adds to the common passes.

    Attributes:
        lowering: the passes that turn gates into operators which the backend has, in order, for a plan.
        finishing: rewrites of every variant for how the backend's runtime works, after everything else.
    """

    lowering: Callable[[Request], Sequence[ir.passes.PassBase]]
    finishing: Callable[[], Sequence[ir.passes.PassBase]]


def lower(traced: ir.Model, plan: Request, backend: BackendPasses, *, check: bool = False) -> Lowered:
    """Lower a traced model; the input is not modified.

    Args:
        traced: gate level, dynamic frame axis (`dvexport.trace.trace`).
        plan: what to make of it.
        backend: the passes of the backend that it is lowered for.
        check: check the dialect's legality after every pass (tests do), not only at the end.

    Raises:
        TraceError: stream mode asked of a model that mixes frames.
        UsageError: an override that is not legal.
        PassError: a pass broke the model; it and those before it are named.
    """
    model = traced.clone()
    steps = [*_table(plan, backend), *backend.finishing()]
    log: list[PassRecord] = []
    for step in steps:
        _apply(step, model, log)
        if check:
            _apply(CheckDialect(), model, log)
    _apply(CheckDialect(), model, log)
    choices = [choice for step in steps if isinstance(step, Chooser) for choice in step.choices]
    return Lowered(model, choices, log)


def _table(plan: Request, backend: BackendPasses) -> list[ir.passes.PassBase]:
    """Return the passes of a plan in order, up to the backend's finishing ones."""
    frames = SetStream() if plan.mode == "stream" else SetClip(plan.frames)
    head: list[ir.passes.PassBase] = [Simplify(), PropagateInactive(), SharePooling(), FoldScores(), frames]
    if plan.variant == "dense":
        return [*head, DropGates(), LowerMasked(), CleanUp()]
    head += [MarkDecisions(), ExposeProbes()]
    if plan.forced:
        head.append(ForceDecisions())
    if plan.variant == "masked":
        return [*head, LowerMasked(), CleanUp()]
    return [*head, *backend.lowering(plan)]


def _apply(step: ir.passes.PassBase, model: ir.Model, log: list[PassRecord]) -> None:
    name = type(step).__name__
    before, start = model.graph.num_nodes(), time.perf_counter()
    try:
        step(model)
    except DvexportError as error:
        error.add_note(f"in pass {name}, after {', '.join(record.name for record in log) or 'none'}")
        raise
    except Exception as error:
        earlier = ", ".join(record.name for record in log) or "none"
        raise PassError(f"pass {name} failed", why=str(error), hint=f"passes before it: {earlier}") from error
    log.append(PassRecord(name, before, model.graph.num_nodes(), time.perf_counter() - start))
