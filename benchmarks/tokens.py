"""Video transformers that drop tokens (STA) beside the same ones that drop none, on each backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.compiled import host
from benchmarks.timing import Timing, take_turns
from dvexport.decisions import TOKENS
from dvexport.dialect.flops import flop_table
from dvexport.export import build_model, traced_levels
from dvexport.models.zoo import describe
from dvexport.passes.pipeline import Request
from dvexport.run.golden import moving_texture
from dvexport.targets.onnx.backend import onnx_variant
from dvexport.targets.onnx.runtime import OnnxVariant
from dvexport.targets.onnx.times import gates_of_nodes, node_times
from dvexport.targets.runtime import Runtime, Variant
from dvexport.targets.tvm.passes import lower
from dvexport.targets.tvm.times import call_times

__all__ = ["COLUMNS", "rates", "token_rows"]

COLUMNS = ("model", "r", "backend", "threads", "GMACs", "ms", "dense ms", "spread", "speed-up", "FLOP ratio",
           "realisation", "choosing", "dense over ORT's")  # fmt: skip


_RATES = {"vit": (48, 64), "video_swin": (192, 320)}
_RECORDED = 4
"""Clips that a recording of every node takes; the first is a warm-up."""


def rates(name: str) -> tuple[int, ...]:
    """Return the values of r that a transformer of the zoo is measured at: of the published ones."""
    return _RATES[describe(name).family]


@dataclass(frozen=True)
class _Level:
    """A model at one r, on every backend."""

    variants: dict[str, Variant]
    macs: int


def token_rows(
    name: str,
    rates: Sequence[int],
    backends: Sequence[str],
    threads: Sequence[int],
    rounds: int,
    tell: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Return the rows of one model: a clip at 224 x 224, random weights.

    All models at all r on all backends take turns in one run. `choosing` is the share of the step that pruning
    itself takes: metric, scores, top-k, gather. `dense over ORT's` is the speed of this backend's dense model over
    that of ONNX Runtime.

    Args:
        name: a transformer of the zoo.
        rates: values of r, above 0.
        backends: `onnx`, `tvm`.
        threads: numbers of threads, each a run.
        rounds: each runs every model once uncounted and once counted.
    """
    levels: dict[int, _Level] = {}
    for r in rates:
        net = build_model(name, None, {"sta.r": r}).model
        gated, dense = traced_levels(net)
        table, plan = flop_table(gated, dense), Request(mode="clip", frames=net.preprocess.frames)
        tell(f"{name}, r = {r}")
        made = {backend: _variants(backend, gated, dense, plan) for backend in backends}
        levels[r] = _Level({backend: sides["gated"] for backend, sides in made.items()}, table.fixed + table.decisions)
        if 0 not in levels:
            levels[0] = _Level({backend: sides["dense"] for backend, sides in made.items()}, table.dense)
    feeds = {"frames": moving_texture(net.preprocess, net.preprocess.frames)}
    timings = {count: _times(levels, feeds, count, rounds) for count in threads}
    return [
        _row(name, r, backend, count, levels, timings[count]) | {
            "choosing": _choosing(levels[r].variants[backend], feeds, count)
        }
        for backend in backends for count in threads for r in rates
    ]  # fmt: skip


def _variants(backend: str, gated: Any, dense: Any, plan: Request) -> dict[str, Variant]:
    if backend == "onnx":
        return {"gated": onnx_variant(gated, plan), "dense": onnx_variant(dense, replace(plan, variant="dense"))}
    from dvexport.targets.tvm.artifact import build_artifact

    native = plan
    models = {"gated": lower(gated, native).model, "dense": lower(dense, replace(native, variant="dense")).model}
    artifact = build_artifact(models, host(), lambda _: None)
    return {side: artifact.variant(side, plan.frames) for side in models}


def _times(
    levels: Mapping[int, _Level], feeds: dict[str, Any], threads: int, rounds: int
) -> dict[tuple[str, int], Timing]:
    """Time every (backend, r), in turn."""
    opened = {
        (backend, r): variant.open(threads=threads)
        for r, level in levels.items() for backend, variant in level.variants.items()
    }  # fmt: skip
    names = {f"{backend} {r}": (backend, r) for backend, r in opened}
    times = take_turns({key: lambda run=opened[at]: _step(run, feeds) for key, at in names.items()}, rounds)  # type: ignore[misc]
    return {at: times[key] for key, at in names.items()}


def _row(
    name: str, r: int, backend: str, threads: int, levels: Mapping[int, _Level], times: Mapping[tuple[str, int], Timing]
) -> dict[str, Any]:
    gated, dense, peer = times[backend, r], times[backend, 0], times.get(("onnx", 0))
    speedup, ratio = gated.speedup_over(dense), levels[0].macs / levels[r].macs
    return {
        "model": name, "r": r, "backend": backend, "threads": threads,
        "GMACs": f"{levels[r].macs / 1e9:.1f} of {levels[0].macs / 1e9:.1f}",
        "ms": f"{gated.median:.0f}", "dense ms": f"{dense.median:.0f}",
        "spread": f"{max(gated.spread, dense.spread):.0%}",
        "speed-up": f"{speedup:.2f}", "FLOP ratio": f"{ratio:.2f}", "realisation": f"{speedup / ratio:.2f}",
        "dense over ORT's": f"{dense.speedup_over(peer):.2f}" if peer and backend != "onnx" else "-",
    }  # fmt: skip


def _step(run: Runtime, feeds: dict[str, Any]) -> float:
    run.run(feeds)
    run.run(feeds)
    return run.seconds


def _choosing(variant: Variant, feeds: dict[str, Any], threads: int) -> str:
    """Return the share of a step that is there for pruning; a recording of a few steps."""
    run = variant.open(threads=threads, profile=True)
    for _ in range(_RECORDED):
        run.run(feeds)
    if isinstance(variant, OnnxVariant):
        times = node_times(run.end_profile(), gates_of_nodes(variant.model, ()), _RECORDED)
    else:
        times = call_times(run.end_profile(), _RECORDED)
    nodes = [node for node in times.nodes if node.role != "control"]  # these enclose others
    total = sum(node.median_us for node in nodes)
    return f"{sum(node.median_us for node in nodes if node.gate == TOKENS.name) / total:.1%}"
