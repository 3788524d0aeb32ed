"""Instructions that a whole gated network executes on AArch64, decisions forced, under emulation.

One step of a stream, after two that are not counted; every step has the same decisions. Skipped work must not be
executed, so instructions should fall as the multiply-accumulates do that the decisions ask for. The latter leave
the policies out, which the dense plan does not have; their instructions are counted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.emulation import count_instructions, find_emulator
from benchmarks.forced import decisions
from benchmarks.static import SIZE, executed, frame
from dvexport.dialect.flops import flop_table
from dvexport.export import build_model
from dvexport.graph.state import states_of
from dvexport.passes.pipeline import Request
from dvexport.targets.catalogue import load
from dvexport.targets.tvm.artifact import build_artifact
from dvexport.targets.tvm.calls.draft import ALGORITHMS
from dvexport.targets.tvm.machine.machine import machine_for
from dvexport.targets.tvm.passes import lower
from dvexport.trace import trace

__all__ = ["COLUMNS", "CPU", "TARGET", "instruction_rows"]

COLUMNS = ("kernels", "side", "flops", "million instructions", "a MAC", "over dense", "over dense, of flops")

TARGET, CPU = "raspberry-pi-4", "cortex-a72"
KERNELS = {"direct": ("direct",), "chosen": ALGORITHMS}

_STEPS = 2, 3
_SHARES = (1.0, 0.5, 0.25)
_AXES = {"channels": ("channels",), "tiles": ("tiles",), "both": ("tiles", "channels")}


def instruction_rows(name: str) -> list[dict[str, Any]]:
    """Compile a gated network of the zoo, its weights random, and count each side's instructions.

    Raises:
        DeviceError: QEMU is not installed, or takes no plugins.
    """
    emulator = [find_emulator("aarch64", plugins=True), "-cpu", CPU]
    traced = trace(build_model(name, None, {}).model, SIZE)
    table = flop_table(traced)
    models = {
        "gated": lower(traced, Request()).model,
        "dense": lower(traced, Request(variant="dense")).model,
        "forced": lower(traced, Request(forced=True)).model,
    }
    sides = {
        f"{axis} {share:.0%}": decisions(models["forced"], **dict.fromkeys(kinds, share))
        for axis, kinds in _AXES.items()
        for share in _SHARES
    }
    rows = []
    for kind, algorithms in KERNELS.items():
        made = build_artifact(models, machine_for(load(TARGET)), lambda _: None, algorithms)

        def count(variant: str, given: dict[str, np.ndarray], made: Any = made) -> int:
            feeds = {key: np.stack([value] * _STEPS[1]) for key, value in {"frames": frame(), **given}.items()}
            return count_instructions(made, variant, feeds, _inputs(models[variant]), emulator, _STEPS)

        dense = count("dense", {})
        rows.append(_row(kind, "dense", 1.0, dense, dense, table.dense))
        for side, given in sides.items():
            flops = executed(table, given)
            rows.append(_row(kind, side, flops, count("forced", given), dense, table.dense))
    return rows


def _row(kind: str, side: str, flops: float, counted: int, dense: int, macs: float) -> dict[str, Any]:
    share = counted / dense
    values = (kind, side, round(flops, 3), round(counted / 1e6, 1), round(counted / (flops * macs), 3),
              round(share, 3), round(share / flops, 3))  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def _inputs(model: ir.Model) -> list[str]:
    """Return the names of what a step is given, in the order of its plan."""
    states = {state.input for state in states_of(model)}
    return [str(value.name) for value in model.graph.inputs if value.name not in states]
