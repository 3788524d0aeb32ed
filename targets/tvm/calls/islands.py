"""Calls of islands: the kernels that Relax and our loops make of what has none of its own."""

from __future__ import annotations

import numpy as np

from dvexport.targets.tvm.calls.draft import Draft
from dvexport.targets.tvm.calls.memory import Buffer
from dvexport.targets.tvm.calls.writers import Writers, label_of
from dvexport.targets.tvm.islands.island import compile_island
from dvexport.targets.tvm.units.catalogue import ISLAND
from dvexport.targets.tvm.units.unit import Unit

__all__ = ["WRITERS"]

WRITERS = Writers()


@WRITERS.writes(ISLAND.name, Unit)
def _island(draft: Draft, unit: Unit) -> None:
    island = compile_island(unit.nodes, unit.inputs, unit.outputs, draft.machine)
    parts = {str(value.name): draft.flat(value) for value in unit.inputs}
    outputs = {str(value.name): value for value in unit.outputs}
    parts |= {name: draft.constants.add(array) for name, array in island.constants.items()}
    for name, (dtype, shape) in island.buffers.items():
        parts[name] = Buffer(name, max(1, int(np.prod(shape))) * np.dtype(dtype).itemsize).part()
    for name, value in outputs.items():
        if name not in island.aliases:
            parts[name] = draft.new_flat(value)
    for kernel, arguments in island.calls:
        draft.calls.call(kernel, [parts[name] for name in arguments], label_of(unit), unit.gate)
    for name, source in island.aliases.items():
        draft.share(outputs[name], parts[source], flat=True)
