"""From the units of a graph to a draft of its plan: the writer of each unit's kind writes its calls."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from dvexport.targets.tvm.calls import attention, convolution, images, islands, linear, merge, tokens
from dvexport.targets.tvm.calls.draft import ALGORITHMS, Draft
from dvexport.targets.tvm.calls.memory import Constants
from dvexport.targets.tvm.machine.machine import Machine
from dvexport.targets.tvm.units.cut import cut

__all__ = ["WRITERS", "write_draft"]

_MODULES = (attention, convolution, images, islands, linear, merge, tokens)

WRITERS = {kind: write for module in _MODULES for kind, write in module.WRITERS.items()}
"""The writer of every kind of unit."""


def write_draft(
    model: ir.Model,
    machine: Machine,
    constants: Constants,
    gates: Collection[str] = (),
    algorithms: Collection[str] = ALGORITHMS,
    threads: int = 1,
) -> Draft:
    """Return the calls of a model's step.

    Args:
        model: lowered for kernels: standard operators, `SparseConv` and `Merge`; frames fixed.
        machine: what to generate kernels for.
        constants: the weights file; what several variants of a model share is stored once.
        gates: names of the model's gates, for profiles.
        algorithms: the algorithms of convolutions; see `Draft`.
        threads: the most that may share a step.

    Raises:
        UsageError: an operator that no kernel can be made for; names the node and where it came from.
    """
    draft = Draft(model, cut(model, gates), machine, constants, algorithms, threads)
    for unit in draft.units:
        WRITERS[unit.kind](draft, unit)
    return draft
