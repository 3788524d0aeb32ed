"""The passes of the native backend: gates stay what they are, since kernels follow every decision."""

from __future__ import annotations

import onnx_ir as ir

from dvexport.passes import pipeline
from dvexport.passes.choose_kernels import ChooseKernels
from dvexport.passes.clean_up import CleanUp
from dvexport.passes.fuse_residual import FuseResidual
from dvexport.passes.lower_masked import LowerMasked
from dvexport.passes.pipeline import BackendPasses, Lowered, Request
from dvexport.passes.split_paths import SplitPaths
from dvexport.targets.tvm.rewrites.fill_types import FillTypes
from dvexport.targets.tvm.rewrites.patches import EmbedPatches
from dvexport.targets.tvm.rewrites.tables import LayOutTables

__all__ = ["KERNELS", "PASSES", "lower"]

KERNELS = ("SparseConv", "Merge", "SelectTokens")
"""Operators of the dialect that there are kernels for."""


def lower(traced: ir.Model, plan: Request, *, check: bool = False) -> Lowered:
    """Lower a traced model for kernels; see `pipeline.lower`."""
    return pipeline.lower(traced, plan, PASSES, check=check)


def _lowering(_plan: Request) -> list[ir.passes.PassBase]:
    return [ChooseKernels(), SplitPaths(), FuseResidual(), CleanUp(), LowerMasked(keep=KERNELS), CleanUp()]


def _finishing() -> list[ir.passes.PassBase]:
    return [EmbedPatches(), LayOutTables(), FillTypes()]


PASSES = BackendPasses(_lowering, _finishing)
