"""Whole ResNet-18 at 224, one frame a step, ONNX Runtime: what forced decisions cost against the dense artifact.

FLOP ratios count the network without its policies, which the dense artifact does not have; their time is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.forced import decisions, group_decisions
from benchmarks.static import SIZE, executed, frame, plain_module, plain_onnx
from benchmarks.timing import Timing, interleave
from dvexport.dialect.flops import flop_table
from dvexport.graph.state import states_of
from dvexport.models import zoo
from dvexport.passes.lowerings import Abilities, CostTable
from dvexport.passes.pipeline import Request
from dvexport.targets.catalogue import load
from dvexport.targets.onnx.emit import emit
from dvexport.targets.onnx.passes import lower
from dvexport.targets.onnx.runtime import OrtSession
from dvexport.trace import trace

__all__ = ["COLUMNS", "channel_rows", "tile_rows"]

COLUMNS = ("threads", "side", "ms", "spread", "flops", "speedup", "realisation")
GROUPS = 4


def tile_rows(threads: int, rounds: int) -> list[dict[str, Any]]:
    """Measure D-STEP with all channels computed and a share of the tiles active."""
    traced = trace(zoo.create("dstep_resnet18"), SIZE)
    table = flop_table(traced)
    gated = _lowered(traced, threads)
    x = frame()
    runs = {"plain static export": _runner(plain_onnx(plain_module("tsn_resnet18")), threads, x)}
    runs["dense artifact"] = _runner(lower(traced, Request(variant="dense")).model, threads, x)
    session = OrtSession(emit(gated), states_of(gated), threads=threads)
    fractions = {"plain static export": 1.0, "dense artifact": 1.0}
    for rate in (1.0, 0.75, 0.5, 0.25, 0.1, 0.0):
        feeds = decisions(gated, tiles=rate)
        runs[f"tiles {rate:.0%}"] = lambda feeds=feeds: session.run({"frames": x, **feeds})  # type: ignore[misc]
        fractions[f"tiles {rate:.0%}"] = executed(table, feeds)
    return _rows(interleave(runs, rounds), fractions, threads)


def channel_rows(threads: int, rounds: int) -> list[dict[str, Any]]:
    """Measure AdaFuse with a share of the channels computed: scattered, and in calibrated groups."""
    traced = trace(zoo.create("adafuse_resnet18"), SIZE)
    table = flop_table(traced)
    x = frame()
    runs = {"dense artifact": _runner(lower(traced, Request(variant="dense")).model, threads, x)}
    fractions = {"dense artifact": 1.0}
    for kind in ("channels", "groups"):
        model = lower(traced, Request(forced=True, overrides={"*": kind})).model
        session = OrtSession(emit(model), states_of(model), threads=threads)
        for rate in (1.0, 0.5, 0.25, 0.0):
            scattered = kind == "channels"
            draw = decisions(model, channels=rate) if scattered else group_decisions(model, GROUPS, rate)
            name = f"{kind} {rate:.0%}"
            runs[name] = lambda session=session, feeds=draw: session.run({"frames": x, **feeds})  # type: ignore[misc]
            fractions[name] = executed(table, draw)
    return _rows(interleave(runs, rounds), fractions, threads)


def _lowered(traced: ir.Model, threads: int) -> ir.Model:
    """Lower with forced decisions, as `choose_lowering` decides for this machine at half of the tiles."""
    target = load("host")
    costs = CostTable(target.costs, threads) if target.costs else None
    plan = Request(forced=True, costs=costs, abilities=Abilities(target.conditional, target.dynamic_shapes))
    return lower(traced, plan).model


def _runner(model: ir.Model, threads: int, x: np.ndarray) -> Callable[[], object]:
    session = OrtSession(emit(model), states_of(model), threads=threads)
    (name,) = [name for name, port in session.inputs.items() if len(port.shape) == 4]
    return lambda: session.run({name: x})


def _rows(timings: Mapping[str, Timing], fractions: Mapping[str, float], threads: int) -> list[dict[str, Any]]:
    dense = timings["dense artifact"]
    rows = []
    for name, timing in timings.items():
        speedup = timing.speedup_over(dense)
        rows.append(
            {
                "threads": threads,
                "side": name,
                "ms": round(timing.median, 2),
                "spread": round(timing.spread, 3),
                "flops": round(fractions[name], 3),
                "speedup": round(speedup, 3),
                "realisation": round(speedup * fractions[name], 3),
            }
        )
    return rows
