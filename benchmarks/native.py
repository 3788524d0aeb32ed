"""Whole ResNet-18 at 224 through our own kernels, one frame a step: forced decisions, and what gates cost.

Every figure is inside the runtime. FLOP ratios count the network without its policies, which the dense plan
does not have; their time is measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.compiled import Compiled, compile_network, host
from benchmarks.forced import decisions
from benchmarks.static import SIZE, executed, frame
from benchmarks.timing import Timing, take_turns
from dvexport.dialect.flops import FlopTable, flop_table
from dvexport.export import build_model
from dvexport.graph.state import states_of
from dvexport.passes.pipeline import Request
from dvexport.targets.onnx import passes
from dvexport.targets.onnx.emit import emit
from dvexport.targets.onnx.runtime import OrtSession
from dvexport.targets.runtime import Runtime
from dvexport.targets.tvm.passes import lower
from dvexport.targets.tvm.session import CallTime, NativeSession
from dvexport.targets.tvm.units.catalogue import KINDS
from dvexport.targets.tvm.units.kinds import Purpose
from dvexport.trace import trace

__all__ = ["CURVES", "GATING", "Network", "curve_rows", "gating_rows", "load_network"]

CURVES = (
    "threads", "side", "flops", "direct ms", "spread", "realisation",
    "chosen ms", "chosen spread", "chosen realisation", "chosen over direct",
)  # fmt: skip
GATING = (
    "threads", "side", "step ms", "convolutions", "always on", "policies", "lists", "merges", "copies",
    "gating of direct dense", "idle step over always on",
)  # fmt: skip

RATES = (1.0, 0.75, 0.5, 0.25, 0.1, 0.0)
AXES = {"channels": ("channels",), "tiles": ("tiles",), "both": ("tiles", "channels")}
DIRECT, CHOSEN = "direct", "chosen"

_GATING = tuple(Purpose)
_PURPOSES = ("convolutions", "always on", *_GATING)


@dataclass(frozen=True)
class Network:
    """A gated network compiled twice: with direct convolutions only, and with all algorithms.

    Attributes:
        forced: lowered for kernels, decisions as inputs.
        dense: lowered for ONNX Runtime, no gates.
        compiled: by `DIRECT` and `CHOSEN`; variants `gated`, `dense` and `forced`.
    """

    table: FlopTable
    forced: ir.Model
    dense: ir.Model
    compiled: Mapping[str, Compiled]


def load_network(name: str) -> Network:
    """Compile a gated network of the zoo, its weights random."""
    traced = trace(build_model(name, None, {}).model, SIZE)
    models = {
        "gated": lower(traced, Request()).model,
        "dense": lower(traced, Request(variant="dense")).model,
        "forced": lower(traced, Request(forced=True)).model,
    }
    compiled = {
        DIRECT: compile_network(models, host(), algorithms=("direct",)),
        CHOSEN: compile_network(models, host()),
    }
    dense = passes.lower(traced, Request(variant="dense")).model
    return Network(flop_table(traced), models["forced"], dense, compiled)


def curve_rows(network: Network, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Measure shares of channels, of tiles and of both, each artifact against its own dense plan."""
    x = frame()
    runs: dict[str, Callable[[], float]] = {"ONNX Runtime dense": _turn(_ort(network, threads), {"frames": x})}
    feeds = _curve_feeds(network.forced)
    for kind, compiled in network.compiled.items():
        runs[f"{kind} dense"] = _turn(compiled.open("dense", threads=threads), {"frames": x})
        session = compiled.open("forced", threads=threads)
        runs |= {f"{kind} {side}": _turn(session, {"frames": x, **given}) for side, given in feeds.items()}
    timings = take_turns(runs, rounds)
    ort = timings["ONNX Runtime dense"]
    rows = [{**_pair("dense", 1.0, timings, threads), "side": "dense"}]
    rows += [_pair(side, executed(network.table, given), timings, threads) for side, given in feeds.items()]
    empty = dict.fromkeys(CURVES, "")
    own = {"threads": threads, "side": "ONNX Runtime dense", "flops": 1.0, "direct ms": round(ort.median, 2),
           "spread": round(ort.spread, 3), "chosen ms": round(ort.median, 2)}  # fmt: skip
    return [{**empty, **own}, *rows]


def gating_rows(network: Network, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Measure what a step spends on its gates, call by call, with everything, half and nothing active."""
    x = frame()
    feeds = {rate: decisions(network.forced, tiles=rate, channels=rate) for rate in (1.0, 0.5, 0.0)}
    profiles: dict[str, dict[str, _Profile]] = {}
    for kind, compiled in network.compiled.items():
        dense = _Profile(compiled.open("dense", threads=threads, profile=True), {"frames": x})
        forced = compiled.open("forced", threads=threads, profile=True)
        always = frozenset(call.label for call in dense.calls() if not call.gate)
        profiles[kind] = {"dense": dense}
        for rate, given in feeds.items():
            profiles[kind][f"{rate:.0%} of both"] = _Profile(forced, {"frames": x, **given}, always)
    sides = {f"{kind}, {side}": one for kind, of_kind in profiles.items() for side, one in of_kind.items()}
    timings = take_turns({side: profile.turn for side, profile in sides.items()}, rounds)
    direct = timings[f"{DIRECT}, dense"].samples_ms
    rows = [_gating_row(side, profile, timings[side].median, direct, threads) for side, profile in sides.items()]
    for row in rows:
        kind, _, active = row["side"].partition(", ")
        if active == "0% of both":
            ratios = timings[row["side"]].samples_ms / profiles[kind]["dense"].samples_ms("always on")
            row["idle step over always on"] = round(float(np.median(ratios)), 3)
    return rows


class _Profile:
    """A side whose calls are added up by what they are for, every round."""

    def __init__(
        self, session: NativeSession, feeds: Mapping[str, np.ndarray], always: frozenset[str] = frozenset()
    ) -> None:
        self._session, self._feeds, self._always = session, feeds, always
        self._sums: dict[str, list[float]] = defaultdict(list)

    def calls(self) -> list[CallTime]:
        """Run a step and return its calls."""
        self._session.run(self._feeds)
        return self._session.call_times()

    def turn(self) -> float:
        """Run twice; return the seconds of the second step, and note where they went."""
        self._session.run(self._feeds)
        sums: dict[str, float] = dict.fromkeys(_PURPOSES, 0)
        for call in self.calls():
            sums[_purpose(call, self._always)] += call.seconds
        for purpose, seconds in sums.items():
            self._sums[purpose].append(1e3 * seconds)
        return self._session.seconds

    def samples_ms(self, *purposes: str) -> np.ndarray:
        """Milliseconds of some purposes together, one value a round."""
        return np.sum([self._sums[purpose] for purpose in purposes], axis=0)


def _purpose(call: CallTime, always: frozenset[str]) -> str:
    """Tell what a call is for.

    A call is always on if the dense plan has it outside of gates. In a dense plan, for which `always` is empty,
    that is a call without a gate, and a gate's calls are its convolutions.
    """
    kind = call.label.split(" ")[0]
    if not always:
        return "convolutions" if call.gate else "always on"
    if call.label in always or kind == "max_pool":
        return "always on"
    if kind == "conv" and any(count is not None for count in call.counts):
        return "convolutions"
    return KINDS[kind].purpose


def _gating_row(side: str, profile: _Profile, step: float, direct: np.ndarray, threads: int) -> dict[str, Any]:
    """Return a row; `direct` is the direct dense step of each round."""
    share = float(np.median(profile.samples_ms(*_GATING) / direct))
    row = dict.fromkeys(GATING, "") | {"threads": threads, "side": side, "step ms": round(step, 3)}
    row |= {name: round(float(np.median(profile.samples_ms(name))), 3) for name in _PURPOSES}
    return row | {"gating of direct dense": f"{share:.2%}"}


def _curve_feeds(forced: ir.Model) -> dict[str, dict[str, np.ndarray]]:
    return {
        f"{axis} {rate:.0%}": decisions(forced, **dict.fromkeys(kinds, rate))
        for axis, kinds in AXES.items()
        for rate in RATES
    }


def _turn(session: Runtime, feeds: Mapping[str, np.ndarray]) -> Callable[[], float]:
    """Return what runs a session twice and tells the seconds of the second run."""

    def measure() -> float:
        session.run(feeds)
        session.run(feeds)
        return session.seconds

    return measure


def _ort(network: Network, threads: int) -> OrtSession:
    return OrtSession(emit(network.dense), states_of(network.dense), threads=threads)


def _pair(side: str, flops: float, timings: Mapping[str, Timing], threads: int) -> dict[str, Any]:
    row: dict[str, Any] = {"threads": threads, "side": side, "flops": round(flops, 3)}
    names = {DIRECT: ("direct ms", "spread", "realisation"),
             CHOSEN: ("chosen ms", "chosen spread", "chosen realisation")}  # fmt: skip
    for kind, (ms, spread, realisation) in names.items():
        timing = timings[f"{kind} {side}"]
        row |= {ms: round(timing.median, 2), spread: round(timing.spread, 3)}
        row[realisation] = round(timing.speedup_over(timings[f"{kind} dense"]) * flops, 3)
    row["chosen over direct"] = round(timings[f"{CHOSEN} {side}"].speedup_over(timings[f"{DIRECT} {side}"]), 3)
    return row
