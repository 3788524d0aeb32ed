"""The same static network in every runtime there is, each in its own process, all in turn.

Every runtime has to give PyTorch's logits before it is timed. One that is not installed has a row that says so:
`make bench` installs them all (the extra `bench`), in an environment of their own.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.adapters import ADAPTERS
from benchmarks.compiled import Compiled, compile_network, host
from benchmarks.static import SIZE, budget, executed, frame, write_static
from benchmarks.timing import Timing, take_turns
from benchmarks.worker import FAILED, MISSING, READY, Worker
from dvexport.dialect.flops import flop_table
from dvexport.export import build_model
from dvexport.graph.state import states_of
from dvexport.passes.pipeline import Request
from dvexport.targets.onnx import passes
from dvexport.targets.onnx.emit import emit
from dvexport.targets.onnx.runtime import OrtSession
from dvexport.targets.tvm.passes import lower
from dvexport.trace import trace

__all__ = ["COLUMNS", "LOW_BUDGET", "peer_rows"]

COLUMNS = (
    "threads", "side", "version", "ms", "spread", "flops", "over ONNX Runtime", "over fastest peer", "difference",
)  # fmt: skip
BASE = "ONNX Runtime"
OURS = ("native", BASE)
"""Adapters whose packages are dependencies of this package."""

LOW_BUDGET = 0.42
"""FLOPs of D-STEP-low relative to the dense network (Raviv et al. 2022)."""

_LIMIT = 1e-3
_GATED = {"tsn_resnet18": "dstep_resnet18", "tsn_resnet50": "dstep_resnet50"}
_BUDGETS = {
    "tiles and channels": ("tiles", "channels"), "tiles": ("tiles",), "channels": ("channels",),
}  # fmt: skip


@dataclass(frozen=True)
class _Side:
    """What runs in a process: an adapter, a network's folder, and its share of the dense MACs."""

    adapter: str
    folder: Path
    flops: float = 1.0


def peer_rows(network: str, threads: list[int], rounds: int, python: str = sys.executable) -> list[dict[str, Any]]:
    """Measure a static network everywhere, and our gated version of it at D-STEP's low budget.

    Args:
        network: `tsn_resnet18` or `tsn_resnet50`.
        threads: thread counts, one after another.
        rounds: how many rounds for each number of threads.
        python: the interpreter that has the packages of other runtimes than `OURS`.
    """
    with tempfile.TemporaryDirectory(prefix="dvexport-bench-") as name:
        sides = _sides(network, Path(name))
        return [row for count in threads for row in _rows(sides, count, rounds, python)]


def _sides(network: str, folder: Path) -> dict[str, _Side]:
    """Write every network that is measured."""
    write_static(network, folder)
    sides = {name: _Side(name, folder) for name in ADAPTERS if name != "native"}
    dense = folder / "native dense"
    dense.mkdir()
    traced = trace(build_model(network, None, {}).model, SIZE)
    compile_network({"gated": lower(traced, Request()).model}, host()).save("gated", dense)
    for file in ("input.npy", "want.npy"):
        (dense / file).write_bytes((folder / file).read_bytes())
    sides["native dense"] = _Side("native", dense)
    return sides | _gated_sides(_GATED[network], folder)


def _gated_sides(name: str, folder: Path) -> dict[str, _Side]:
    """Write our gated network with decisions at the low budget; its logits have to be ONNX Runtime's."""
    traced = trace(build_model(name, None, {}).model, SIZE)
    table = flop_table(traced)
    reference = passes.lower(traced, Request(forced=True, overrides={"*": "masked"})).model
    model = lower(traced, Request(forced=True)).model
    compiled, sides = compile_network({"gated": model}, host()), {}
    for title, kinds in _BUDGETS.items():
        feeds = budget(model, table, LOW_BUDGET, kinds)
        side = _write_gated(compiled, feeds, reference, folder / f"native {title}")
        sides[f"native, {LOW_BUDGET:.0%}: {title}"] = _Side("native", side, executed(table, feeds))
    return sides


def _write_gated(compiled: Compiled, feeds: dict[str, np.ndarray], reference: Any, folder: Path) -> Path:
    folder.mkdir()
    compiled.save("gated", folder)
    x = frame()
    session = OrtSession(emit(reference), states_of(reference))
    np.save(folder / "input.npy", x)
    np.save(folder / "want.npy", session.run({"frames": x, **feeds})["logits"])
    np.savez(folder / "decisions.npz", **feeds)  # type: ignore[arg-type]
    return folder


def _rows(sides: Mapping[str, _Side], threads: int, rounds: int, python: str) -> list[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, side in sides.items():
            interpreter = sys.executable if side.adapter in OURS else python
            workers[name] = Worker(side.adapter, side.folder, threads, interpreter)
            stack.callback(workers[name].close)
        able = {name: worker for name, worker in workers.items() if _is_right(worker)}
        timings = take_turns({name: worker.measure for name, worker in able.items()}, rounds)
    return [_row(name, sides[name], workers[name], timings, threads) for name in sides]


def _is_right(worker: Worker) -> bool:
    """Tell whether a worker may be timed; one that computes something else may not."""
    if worker.state == READY and not worker.error <= _LIMIT:
        worker.state, worker.why = FAILED, f"its logits differ by {worker.error:.1e} of the largest"
    return worker.state == READY


def _row(name: str, side: _Side, worker: Worker, timings: Mapping[str, Timing], threads: int) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"threads": threads, "side": name, "version": worker.version, "flops": round(side.flops, 3)}
    if name not in timings:
        return row | {"version": worker.state if worker.state == MISSING else f"{worker.state}: {worker.why}"}
    timing = timings[name]
    if BASE in timings:
        row["over ONNX Runtime"] = round(timing.speedup_over(timings[BASE]), 3)
        fastest = min((timings[name] for name in timings if name in ADAPTERS), key=lambda peer: peer.median)
        row["over fastest peer"] = round(timing.speedup_over(fastest), 3)
    difference = float(f"{worker.error:.1e}")
    return row | {"ms": round(timing.median, 2), "spread": round(timing.spread, 3), "difference": difference}
