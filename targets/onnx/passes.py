"""The passes of the ONNX Runtime backend: gates become standard operators, written as this runtime runs them best."""

from __future__ import annotations

import onnx_ir as ir

from dvexport.passes import pipeline
from dvexport.passes.choose_lowering import ChooseLowering
from dvexport.passes.clean_up import CleanUp
from dvexport.passes.fuse_residual import FuseResidual
from dvexport.passes.group_channels import GroupChannels
from dvexport.passes.lower_channels import LowerChannels
from dvexport.passes.lower_groups import LowerGroups
from dvexport.passes.lower_masked import LowerMasked
from dvexport.passes.onnx_simplifier import OnnxSimplifier
from dvexport.passes.pipeline import BackendPasses, Lowered, Request
from dvexport.passes.skip_idle import SkipIdle
from dvexport.passes.split_paths import SplitPaths
from dvexport.passes.tiles.keep_rows import KeepRows
from dvexport.passes.tiles.lower_tiles import LowerTiles
from dvexport.passes.update_in_place import UpdateInPlace
from dvexport.targets.onnx.rewrites.gelu import ExpandGelu
from dvexport.targets.onnx.rewrites.key_biases import FoldKeyBiases
from dvexport.targets.onnx.rewrites.windows import LoopWindows

__all__ = ["PASSES", "lower"]

_IDLE = 0.15
"""Expected share of active tiles below which most frames leave most gates alone. With 60 % of the tiles active the
conditionals made a step 7 % slower, with none a fifth faster (ONNX Runtime, shipped models)."""


def lower(traced: ir.Model, plan: Request, *, check: bool = False) -> Lowered:
    """Lower a traced model for ONNX Runtime; see `pipeline.lower`."""
    return pipeline.lower(traced, plan, PASSES, check=check)


def _lowering(plan: Request) -> list[ir.passes.PassBase]:
    idle: list[ir.passes.PassBase] = [SkipIdle()] if _mostly_idle(plan) else []
    return [
        ChooseLowering(plan.abilities, plan.costs, plan.rates, plan.overrides),
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
    ]


def _mostly_idle(plan: Request) -> bool:
    """Tell whether conditionals around whole gates pay: they cost busy gates more than idle ones save."""
    active = [rates.tiles for rates in plan.rates.values()]
    return plan.abilities.conditional == "lazy" and bool(active) and sum(active) / len(active) < _IDLE


def _finishing() -> list[ir.passes.PassBase]:
    return [OnnxSimplifier(), ExpandGelu(), FoldKeyBiases(), LoopWindows(), UpdateInPlace(), CleanUp()]


PASSES = BackendPasses(_lowering, _finishing)
