"""The order of the passes: one table for each variant of a model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from dvexport.errors import DvexportError, PassError, unknown_name
from dvexport.passes.check_dialect import CheckDialect
from dvexport.passes.choose_kernels import ChooseKernels
from dvexport.passes.choose_lowering import Abilities, Choice, ChooseLowering, CostTable, Rates
from dvexport.passes.clean_up import CleanUp
from dvexport.passes.drop_gates import DropGates
from dvexport.passes.expose_probes import ExposeProbes, ForceDecisions
from dvexport.passes.fold_scores import FoldScores
from dvexport.passes.fuse_residual import FuseResidual
from dvexport.passes.group_channels import ChannelStatistics, GroupChannels
from dvexport.passes.lower_channels import LowerChannels
from dvexport.passes.lower_groups import LowerGroups
from dvexport.passes.lower_masked import LowerMasked
from dvexport.passes.mark_decisions import MarkDecisions
from dvexport.passes.propagate_inactive import PropagateInactive
from dvexport.passes.set_frames import SetClip, SetStream
from dvexport.passes.share_pooling import SharePooling
from dvexport.passes.simplify import Simplify
from dvexport.passes.skip_idle import SkipIdle
from dvexport.passes.split_paths import SplitPaths
from dvexport.passes.tiles.keep_rows import KeepRows
from dvexport.passes.tiles.lower_tiles import LowerTiles
from dvexport.passes.update_in_place import UpdateInPlace

__all__ = ["Lowered", "PassRecord", "Plan", "lower"]

MODES = ("stream", "clip")
VARIANTS = ("gated", "dense", "masked")
_KERNELS = ("SparseConv", "Merge", "SelectTokens")
_IDLE = 0.15
"""Expected share of active tiles below which most frames leave most gates alone. With 60 % of the tiles active the
conditionals made a step 7 % slower, with none a fifth faster (ONNX Runtime, shipped models)."""


@dataclass(frozen=True)
class Plan:
    """What to make of a traced model.

    Attributes:
        mode: `stream` (one frame a step, explicit state) or `clip`.
        frames: frames of a clip; ignored in stream mode.
        variant: `gated`, what is shipped; `dense`, no gates at all; `masked`, all work then masks.
        forced: take decisions from inputs (`expose_probes.forced_name`) instead of from the gates.
        abilities, costs, rates, overrides: see `ChooseLowering`.
        statistics: channel actions seen in calibration, by gate, for `GroupChannels`.
        kernels: the backend has kernels for `SparseConv` and `Merge`: gates are left to them.
    """

    mode: str = "stream"
    frames: int = 8
    variant: str = "gated"
    forced: bool = False
    abilities: Abilities = field(default_factory=Abilities)
    costs: CostTable | None = None
    rates: Mapping[str, Rates] = field(default_factory=dict)
    overrides: Mapping[str, str] = field(default_factory=dict)
    statistics: Mapping[str, ChannelStatistics] = field(default_factory=dict)
    kernels: bool = False

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


@dataclass
class Lowered:
    """A model of operators that the backend has, with what was decided on the way."""

    model: ir.Model
    choices: list[Choice]
    log: list[PassRecord]


def lower(traced: ir.Model, plan: Plan, *, check: bool = False) -> Lowered:
    """Lower a traced model; the input is not modified.

    Args:
        traced: gate level, dynamic frame axis (`dvexport.trace.trace`).
        plan: what to make of it.
        check: check the dialect's legality after every pass (tests do), not only at the end.

    Raises:
        TraceError: stream mode asked of a model that mixes frames.
        UsageError: an override that is not legal.
        PassError: a pass broke the model; it and those before it are named.
    """
    model = traced.clone()
    chooser = (
        ChooseKernels() if plan.kernels else ChooseLowering(plan.abilities, plan.costs, plan.rates, plan.overrides)
    )
    log: list[PassRecord] = []
    for step in _table(plan, chooser):
        _apply(step, model, log)
        if check:
            _apply(CheckDialect(), model, log)
    _apply(CheckDialect(), model, log)
    return Lowered(model, chooser.choices, log)


def _table(plan: Plan, chooser: ChooseLowering | ChooseKernels) -> list[ir.passes.PassBase]:
    """Return the passes of a plan, in order."""
    frames = SetStream() if plan.mode == "stream" else SetClip(plan.frames)
    head: list[ir.passes.PassBase] = [Simplify(), PropagateInactive(), SharePooling(), FoldScores(), frames]
    if plan.variant == "dense":
        return [*head, DropGates(), LowerMasked(), CleanUp()]
    head += [MarkDecisions(), ExposeProbes()]
    if plan.forced:
        head.append(ForceDecisions())
    if plan.variant == "masked":
        return [*head, LowerMasked(), CleanUp()]
    if plan.kernels:
        return [*head, chooser, SplitPaths(), FuseResidual(), CleanUp(), LowerMasked(keep=_KERNELS), CleanUp()]
    idle: list[ir.passes.PassBase] = [SkipIdle()] if _mostly_idle(plan) else []
    return [
        *head,
        chooser,
        GroupChannels(plan.statistics),
        SplitPaths(),
        FuseResidual(),
        LowerTiles(),
        KeepRows(),
        LowerChannels(),
        LowerGroups(),
        CleanUp(),  # before masking, so that nothing unused is expanded
        LowerMasked(),
        CleanUp(),
        *idle,
        UpdateInPlace(),
        CleanUp(),
    ]


def _mostly_idle(plan: Plan) -> bool:
    """Tell whether conditionals around whole gates pay: they cost busy gates more than idle ones save."""
    active = [rates.tiles for rates in plan.rates.values()]
    return plan.abilities.conditional == "lazy" and bool(active) and sum(active) / len(active) < _IDLE


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
