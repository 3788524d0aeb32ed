"""The shipped gated models on the shipped clips, their own decisions: what their gates save with our kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compiled import compile_network, host
from benchmarks.timing import take_turns
from dvexport.dialect.flops import flop_table
from dvexport.export import build_model
from dvexport.graph.state import states_of
from dvexport.models import zoo
from dvexport.passes.pipeline import Request
from dvexport.run.session import Session
from dvexport.targets.onnx import passes
from dvexport.targets.onnx.emit import emit
from dvexport.targets.onnx.runtime import OrtSession
from dvexport.targets.tvm.passes import lower
from dvexport.trace import trace
from dvexport.video.clips import read_clip

__all__ = ["COLUMNS", "MODELS", "trained_rows"]

COLUMNS = ("threads", "model", "side", "ms a frame", "spread", "flops", "speedup", "realisation")
MODELS = ("dstep_motion_d40", "dstep_motion_d60")


def trained_rows(model: str, threads: list[int], rounds: int) -> list[dict[str, Any]]:
    """Play every shipped clip through the gated and the dense plan and ONNX Runtime, in turn."""
    source = build_model(model, None, {}).model
    traced = trace(source, source.preprocess.size)
    models = {
        "gated": lower(traced, Request()).model,
        "dense": lower(traced, Request(variant="dense")).model,
    }
    dense = passes.lower(traced, Request(variant="dense")).model
    compiled = compile_network(models, host())
    clips = [read_clip(path, source.preprocess).frames for path in _clips()]
    table, rows = flop_table(traced), []
    for count in threads:
        sessions = {
            "ONNX Runtime dense": Session(OrtSession(emit(dense), states_of(dense), threads=count), mode="stream"),
            "dense": Session(compiled.open("dense", threads=count), mode="stream"),
            "gated": Session(compiled.open("gated", threads=count), mode="stream"),
        }
        steps = [sessions["gated"].run_clip(clip) for clip in clips]
        work = [table.executed([step.decisions for step in clip]).frames for clip in steps]
        flops = float(np.mean([macs - table.decisions for frames in work for macs in frames])) / table.dense
        timings = take_turns({name: _plays(session, clips) for name, session in sessions.items()}, rounds)
        for name, timing in timings.items():
            share, speedup = flops if name == "gated" else 1.0, timing.speedup_over(timings["dense"])
            rows.append(
                {
                    "threads": count, "model": model, "side": name, "ms a frame": round(timing.median, 3),
                    "spread": round(timing.spread, 3), "flops": round(share, 3), "speedup": round(speedup, 3),
                    "realisation": round(speedup * share, 3) if name != "ONNX Runtime dense" else "",
                }
            )  # fmt: skip
    return rows


def _clips() -> list[Path]:
    return sorted((zoo.weights_folder().parent / "clips").glob("*.mp4"))


def _plays(session: Session, clips: list[np.ndarray]) -> Callable[[], float]:
    """Return what plays all clips and tells the mean seconds of a step."""
    return lambda: float(np.mean([step.seconds for clip in clips for step in session.run_clip(clip)]))
