"""Video transformers that drop tokens (STA) beside the same ones that drop none, on each backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.compiled import host
from benchmarks.timing import take_turns
from dvexport.backends import onnx_variant
from dvexport.dialect.flops import flop_table
from dvexport.export import build_model, traced_levels
from dvexport.golden import moving_texture
from dvexport.graph import TOKENS
from dvexport.passes.pipeline import Plan, lower
from dvexport.profile.call_times import call_times
from dvexport.profile.node_times import gates_of_nodes, node_times
from dvexport.targets.onnx.runtime import OnnxVariant
from dvexport.targets.runtime import Runtime, Variant

__all__ = ["COLUMNS", "token_rows"]

COLUMNS = ("model", "r", "backend", "threads", "GMACs", "dense GMACs", "ms", "dense ms", "spread", "speed-up",
           "FLOP ratio", "realisation", "choosing")  # fmt: skip


def token_rows(
    name: str, r: int, backend: str, threads: list[int], rounds: int, tell: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Return the rows of one model at one r: 16 frames at 224 x 224, random weights.

    `choosing` is the share of the step that pruning itself takes: metric, scores, top-k, gather.

    Args:
        name: a transformer of the zoo.
        backend: `onnx` or `tvm`.
        threads: numbers of threads, a row each.
        rounds: each runs the gated and the dense model once uncounted, once counted, in turn.
    """
    net = build_model(name, None, {"sta.r": r}).model
    frames = net.preprocess.frames
    tell("trace")
    gated, dense = traced_levels(net)
    plan = Plan(mode="clip", frames=frames)
    variants: dict[str, Variant]
    if backend == "onnx":
        variants = {"gated": onnx_variant(gated, plan), "dense": onnx_variant(dense, replace(plan, variant="dense"))}
    else:
        variants = _compiled(gated, dense, plan, tell)
    table = flop_table(gated, dense)
    executed = table.fixed + table.decisions
    feeds = {"frames": moving_texture(net.preprocess, frames)}
    rows = []
    for count in threads:
        opened = {side: variant.open(threads=count) for side, variant in variants.items()}
        times = take_turns({side: lambda run=run: _step(run, feeds) for side, run in opened.items()}, rounds)  # type: ignore[misc]
        speedup, ratio = times["gated"].speedup_over(times["dense"]), table.dense / executed
        rows.append({
            "model": name, "r": r, "backend": backend, "threads": count,
            "GMACs": f"{executed / 1e9:.1f}", "dense GMACs": f"{table.dense / 1e9:.1f}",
            "ms": f"{times['gated'].median:.0f}", "dense ms": f"{times['dense'].median:.0f}",
            "spread": f"{max(time.spread for time in times.values()):.0%}",
            "speed-up": f"{speedup:.2f}", "FLOP ratio": f"{ratio:.2f}", "realisation": f"{speedup / ratio:.2f}",
            "choosing": _choosing(variants["gated"], feeds, count),
        })  # fmt: skip
    return rows


def _compiled(gated: Any, dense: Any, plan: Plan, tell: Callable[[str], None]) -> dict[str, Variant]:
    from dvexport.targets.tvm.artifact import build_artifact

    native = replace(plan, kernels=True)
    models = {"gated": lower(gated, native).model, "dense": lower(dense, replace(native, variant="dense")).model}
    artifact = build_artifact(models, host(), tell)
    return {side: artifact.variant(side, plan.frames) for side in models}


def _step(run: Runtime, feeds: dict[str, Any]) -> float:
    run.run(feeds)
    run.run(feeds)
    return run.seconds


def _choosing(variant: Variant, feeds: dict[str, Any], threads: int) -> str:
    """Return the share of a step's nodes that are there for pruning; a recording of a few steps."""
    run = variant.open(threads=threads, profile=True)
    for _ in range(4):
        run.run(feeds)
    if isinstance(variant, OnnxVariant):
        times = node_times(run.end_profile(), gates_of_nodes(variant.model, ()), skip=1)
    else:
        times = call_times(run.end_profile(), skip=1)
    total = sum(node.median_us for node in times.nodes)
    share = sum(node.median_us for node in times.nodes if node.gate == TOKENS) / total
    return f"{share:.1%}" if share else "-"
