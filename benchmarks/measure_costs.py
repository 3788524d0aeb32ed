"""Measure the cost table that `choose_lowering` reads, on this machine, and write it into its catalogue file.

    python -m benchmarks.measure_costs [--rounds N] [--print]

For every shape a small network of gated residual blocks (two convolutions, merge, sum) is lowered in each way
that is legal, and run at several rates with all lowerings interleaved. A point is the time of one block
divided by its two convolutions, so everything a lowering needs around them is in it.
"""

from __future__ import annotations

import argparse
import platform
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from benchmarks.timing import interleave
from dvexport.errors import UsageError
from dvexport.graph.graph import DV, FRAMES, OPSET, Builder, static_shape
from dvexport.graph.state import states_of
from dvexport.passes.group_channels import even_groups
from dvexport.passes.lowerings import LOWERINGS, ConvShape
from dvexport.passes.pipeline import Request
from dvexport.profile.measure import random_decisions
from dvexport.targets import catalogue
from dvexport.targets.onnx.emit import emit
from dvexport.targets.onnx.passes import lower
from dvexport.targets.onnx.runtime import OrtSession

BLOCKS = 3
RATES = (0.0, 0.25, 0.5, 1.0)
SHAPES = [
    # ResNet at 224: full width, then half, as the shipped models have it. Then half width at 160.
    *[(c, c, s, 3, 1, p) for c, s, p in ((64, 56, 8), (128, 28, 4), (256, 14, 2), (512, 7, 1))],
    *[(c, c, s, 3, 1, p) for c, s, p in ((32, 56, 8), (64, 28, 4), (128, 14, 2), (256, 7, 1))],
    *[(c, c, s, 3, 1, p) for c, s, p in ((32, 40, 8), (64, 20, 4), (128, 10, 2), (256, 5, 1))],
    # Pointwise convolutions of bottlenecks.
    *[(c, c, s, 1, 1, p) for c, s, p in ((128, 56, 8), (256, 28, 4), (512, 14, 2), (1024, 7, 1))],
]


def main() -> None:
    """Measure every shape and rewrite the catalogue entry of this machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--print", action="store_true", help="print the table, write nothing")
    arguments = parser.parse_args()
    rows: list[tuple[str, list[int], float, int]] = []
    for threads in arguments.threads:
        for shape in SHAPES:
            rows += _measure(ConvShape(*shape), threads, arguments.rounds)
            print(f"{shape}: " + ", ".join(f"{k} {s[-1]}% {ms:.3f}" for k, s, ms, _ in rows[-8:]), flush=True)
    text = _toml(rows)
    if arguments.print:
        print(text)
    else:
        print(f"wrote {_rewrite(text)}")


def _measure(shape: ConvShape, threads: int, rounds: int) -> list[tuple[str, list[int], float, int]]:
    """Return (lowering, shape and percent, ms a convolution, threads) for every legal lowering.

    With a tile mask beside the actions, and with actions alone: then the whole plane is the only cell.
    """
    whole = replace(shape, cell=shape.size)
    sides: dict[str, Callable[[], object]] = {}
    keys: dict[str, tuple[str, list[int]]] = {}
    for at in (shape, whole):
        for kind in LOWERINGS:
            _prepare(at, kind, threads, sides, keys)
    timings = interleave(sides, rounds)
    return [(*keys[name], timing.median / (2 * BLOCKS), threads) for name, timing in timings.items()]


def _prepare(
    shape: ConvShape,
    kind: str,
    threads: int,
    sides: dict[str, Callable[[], object]],
    keys: dict[str, tuple[str, list[int]]],
) -> None:
    """Add the runs of one lowering at every rate, if it is legal for the shape."""
    frame = np.random.default_rng(0).random((1, shape.cin, shape.size, shape.size), np.float32)
    try:
        model = lower(_network(shape), Request(overrides={f"gate{i}": kind for i in range(BLOCKS)})).model
    except UsageError:
        return
    session = OrtSession(emit(model), states_of(model), threads=threads)
    for rate in RATES if kind != "masked" else (1.0,):
        drawn = _decisions(model, kind, rate)
        of_kind = [
            drawn[name]
            for name in drawn
            if name.startswith("tiles" if LOWERINGS[kind].follows == "tiles" else "action")
        ]
        percent = round(100 * float(np.mean([np.count_nonzero(decision) / decision.size for decision in of_kind])))
        name = f"{kind} {shape.cell} {rate}"
        sides[name] = partial(session.run, {"frames": frame, **drawn})
        keys[name] = (kind, [*_size(shape), percent])


def _decisions(model: ir.Model, kind: str, rate: float) -> dict[str, np.ndarray]:
    """Draw the network's decisions: `rate` of what the lowering saves by, all of the other kind."""
    inputs = {v.name or "": v for v in model.graph.inputs if (v.name or "").startswith(("tiles", "action"))}
    shapes = {(name, name.rstrip("0123456789")): static_shape(v) for name, v in inputs.items()}
    rates = {
        "tiles": rate if LOWERINGS[kind].follows == "tiles" else 1.0,
        "channels": rate if LOWERINGS[kind].follows == "action" else 1.0,
    }
    if kind != "groups":
        (drawn,) = random_decisions(shapes, rates, frames=1)
        return {name: value for (name, _), value in drawn.items()}
    # Whole groups, as they lie without calibration.
    edges = {name: even_groups(0, shape[1]) for (name, of), shape in shapes.items() if of == "action"}
    counts = {(name, of): (len(edges[name]) - 1,) if of == "action" else shape for (name, of), shape in shapes.items()}
    (drawn,) = random_decisions(counts, rates, frames=1)
    wide = {name: np.repeat(value, np.diff(edges[name]))[None] for (name, _), value in drawn.items() if name in edges}
    return {name: wide.get(name, value) for (name, _), value in drawn.items()}


def _size(shape: ConvShape) -> list[int]:
    return [shape.cin, shape.cout, shape.size, shape.kernel, shape.stride, shape.cell]


def _network(shape: ConvShape) -> ir.Model:
    """Residual blocks of two gated convolutions whose decisions are inputs."""
    rng = np.random.default_rng(0)
    build = Builder()
    grid = shape.size // shape.cell
    x = _input(FRAMES, [FRAMES, shape.cin, shape.size, shape.size], ir.DataType.FLOAT)
    inputs, value = [x], x
    for index in range(BLOCKS):
        tiles = _input(f"tiles{index}", [FRAMES, grid, grid], ir.DataType.BOOL) if grid > 1 else None
        action = _input(f"action{index}", [FRAMES, shape.cout], ir.DataType.INT64)
        inputs += [action] if tiles is None else [action, tiles]
        gate = f"gate{index}"
        u = _conv(build, rng, shape, value, gate, tiles, action, activation="relu")
        z = _conv(build, rng, shape, u, gate, tiles, None, activation="none")
        plane: list[int | str] = [FRAMES, shape.cout, shape.size, shape.size]
        total = build.op("Add", value, z, shape=plane, dtype=ir.DataType.FLOAT)
        value = build.op("Relu", total, shape=plane, dtype=ir.DataType.FLOAT)
    value.name = "logits"
    graph = ir.Graph(inputs, [value], nodes=build.nodes, opset_imports={"": OPSET, DV: 1}, name="blocks")
    return ir.Model(graph, ir_version=10)


def _conv(
    build: Builder,
    rng: np.random.Generator,
    shape: ConvShape,
    x: ir.Value,
    gate: str,
    tiles: ir.Value | None,
    action: ir.Value | None,
    activation: str,
) -> ir.Value:
    weight = rng.standard_normal((shape.cout, shape.cin, shape.kernel, shape.kernel)).astype(np.float32)
    weight /= np.sqrt(shape.cin * shape.kernel**2)
    pad = shape.kernel // 2
    return build.op(
        "GatedConv",
        x,
        build.const(weight),
        build.const(np.zeros(shape.cout, np.float32)),
        action,
        tiles,
        domain=DV,
        shape=[FRAMES, shape.cout, shape.size, shape.size],
        dtype=ir.DataType.FLOAT,
        pads=[pad] * 4,
        activation=activation,
        gate=gate,
    )


def _input(name: str, shape: list[int | str], dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _toml(rows: list[tuple[str, list[int], float, int]]) -> str:
    """Return the rows as the catalogue writes them."""
    source = f"python -m benchmarks.measure_costs, onnxruntime {onnxruntime.__version__}, {_cpu()}"
    lines = [f'costs_source = "{source}"', "costs = ["]
    for kernel, size, ms, threads in rows:
        lines.append(f'  {{ kernel = "{kernel}", size = {size}, ms = {ms:.4f}, threads = {threads} }},')
    return "\n".join([*lines, "]"])


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1) if found else platform.machine()


def _rewrite(text: str) -> Path:
    """Put the table at the end of the top level of this machine's catalogue file."""
    folder = Path(catalogue.__file__).parent / "catalog"
    path = folder / f"{catalogue.load('host').name}.toml"
    old = re.sub(r"(?ms)^costs_source = .*?^\]\n+", "", path.read_text(encoding="utf-8"))
    top, _, tables = old.partition("\n[")
    path.write_text(f"{top.rstrip()}\n\n{text}\n\n[{tables}", encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
