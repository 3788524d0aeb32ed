"""Tiny kernels and plans for tests of the runtime: every space, dtype, gated call and choice that a network has."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm.tirx as tx
from native_harness import host_machine
from tvm.tirx.script import builder as T

from dvexport.targets import catalogue
from dvexport.targets.tvm.build import link
from dvexport.targets.tvm.build.compile import compile_kernels
from dvexport.targets.tvm.kernels.abi import Frame, Kernel, i64, share, write_kernel, write_serial_kernel
from dvexport.targets.tvm.kernels.bounds import (
    PARTS,
    ListKind,
    Made,
    entry,
    fits,
    known,
    least,
    most,
    reads,
    uses,
    writes,
)
from dvexport.targets.tvm.machine.machine import Machine, machine_of
from dvexport.targets.tvm.plan import COST_TERMS, Alternative, Call, Place, Plan, Port, Space
from dvexport.targets.tvm.plan_file import HEADER_BYTES, plan_bytes

CHANNELS = 200
"""Floats of the sample network's frame."""

MOST_THREADS = 8
COSTS = {"copy_few": (10.0, 40.0), "copy_many": (2000.0, 1.0)}
"""(constant, per channel) in ns: `copy_few` is the cheaper one up to 51 channels."""

WAITS = {"copy_few": (10.0, 40.0, 2100.0), "copy_many": (2000.0, 1.0, 1e9)}
"""(constant, line, stream) in ns: `copy_few` is the cheaper one up to 51 input channels, and again from 111 on."""

EXAMPLE_TARGETS = ("raspberry-pi-4", "rv1126", "android-arm64")
"""Catalogue entries for AArch64, ARMv7 and Android."""


@dataclasses.dataclass(frozen=True)
class Network:
    """What a session is opened with, and what it was made of."""

    library: bytes
    plan: bytes
    weights: bytes
    objects: dict[str, bytes]
    table: list[link.Entry]
    machine: Machine


@contextmanager
def each_float(frame: Frame) -> Iterator[Any]:
    """Loop over this thread's share of `frame.shape[0]` elements."""
    low, high = share(frame.shape[0], frame.part, frame.parts)
    with T.serial(low, high) as i:
        yield T.bind(i64(i))


def relu() -> Kernel:
    """Y = max(X, 0)."""
    with write_kernel("relu", X="float32", shape="int32", Y="float32") as frame, each_float(frame) as i:
        T.buffer_store(frame.Y, tx.max(frame.X[i], tx.FloatImm("float32", 0)), [i])
        _states_floats(frame, "X")
    return frame.kernel


def add(name: str = "add") -> Kernel:
    """Y = X + Z; Y may be X or Z."""
    types = {"X": "float32", "Z": "float32", "shape": "int32", "Y": "float32"}
    with write_kernel(name, **types) as frame, each_float(frame) as i:
        T.buffer_store(frame.Y, frame.X[i] + frame.Z[i], [i])
        _states_floats(frame, "X", "Z")
    return frame.kernel


def _states_floats(frame: Frame, *inputs: str) -> None:
    floats = entry(0)
    stated = dict.fromkeys(inputs, reads(floats)) | {"shape": reads(1), "Y": writes(floats, over=inputs)}
    frame.states(stated, fits(floats * PARTS))


def decide() -> Kernel:
    """Channels with X > 0: their list, action 2 (else 0), and bool tiles of the first four."""
    types = {"X": "float32", "shape": "int32", "rows": "int32", "action": "int64", "tiles": "uint8"}
    with write_serial_kernel("decide", **types) as frame:
        T.buffer_store(frame.rows, 0, [i64(0)])
        with T.serial(0, frame.shape[0]) as i:
            is_on = T.bind(frame.X[i64(i)] > tx.FloatImm("float32", 0))
            T.buffer_store(frame.action, tx.Select(is_on, i64(2), i64(0)), [i64(i)])
            with T.If(i < 4), T.Then():
                T.buffer_store(frame.tiles, tx.Cast("uint8", is_on), [i64(i)])
            with T.If(is_on), T.Then():
                count = T.bind(frame.rows[i64(0)] + 1)
                T.buffer_store(frame.rows, i, [i64(count)])
                T.buffer_store(frame.rows, count, [i64(0)])
        items = entry(0)
        frame.states(
            {
                "X": reads(items), "shape": reads(1), "rows": writes(items + 1), "action": writes(items),
                "tiles": writes(least(items, 4)),
            },
            makes=(Made("rows", ListKind.CHANNELS, items, items),),
        )  # fmt: skip
    return frame.kernel


def copy_listed(name: str) -> Kernel:
    """Y[c] = X[c] for the channels c in `rows`."""
    with write_kernel(name, X="float32", rows="int32", Y="float32") as frame:
        low, high = share(frame.rows[0], frame.part, frame.parts)
        with T.serial(low, high) as i:
            channel = T.bind(i64(frame.rows[i64(i + 1)]))
            T.buffer_store(frame.Y, frame.X[channel], [channel])
        items = known("rows", "limit")
        frame.states({"X": reads(items), "rows": uses(ListKind.CHANNELS), "Y": writes(items)})
    return frame.kernel


def who(name: str, *, splits: bool = True) -> Kernel:
    """Y[part] = parts, and one more in the element after the last part: how often part 0 ran."""
    write = write_kernel if splits else write_serial_kernel
    with write(name, Y="int32") as frame:
        T.buffer_store(frame.Y, frame.parts, [i64(frame.part)])
        with T.If(tx.EQ(frame.part, 0)), T.Then():
            T.buffer_store(frame.Y, frame.Y[i64(MOST_THREADS)] + 1, [i64(MOST_THREADS)])
        frame.states({"Y": writes(most(PARTS, MOST_THREADS + 1))})
    return frame.kernel


def _cost(constant: float, row: float = 0.0, line: float = 0.0, stream: float = 0.0) -> tuple[float, ...]:
    """A cost model of these coefficients alone."""
    return (constant, row, *[0.0] * (COST_TERMS - 4), line, stream)


def sample_plan() -> Plan:
    """A frame's relu; its running sum (state) and sum of two frames (flip); a gated copy; who ran."""
    floats, ints = 4 * CHANNELS, 4 * (CHANNELS + 16)
    shape = Place(Space.WEIGHTS, 0, 4)
    x, y, rows = (Place(Space.ARENA, 1024 * i, size) for i, size in enumerate((floats, floats, ints)))
    double = Place(Space.ARENA, 3072, floats)
    action, tiles = Place(Space.ARENA, 4096, 8 * CHANNELS), Place(Space.ARENA, 4096 + 2048, 4)
    ran = [Place(Space.STATE, 2048 + 64 * i, 4 * (MOST_THREADS + 1)) for i in range(3)]
    total, copied = Place(Space.STATE, 0, floats), Place(Space.STATE, 1024, floats)
    before, after = Place(Space.BEFORE, 0, floats), Place(Space.AFTER, 0, floats)
    expensive, cheap = _cost(9000.0), _cost(100.0)
    calls = [
        Call((Alternative("relu", (x, shape, y)),), "layer1/relu"),
        Call((Alternative("add", (total, y, shape, total)),), "layer1/sum"),
        Call((Alternative("add", (y, y, shape, after)),), "layer2/keep"),
        Call((Alternative("add", (before, after, shape, double)),), "layer2/pair"),
        Call((Alternative("decide", (y, shape, rows, action, tiles)),), "gate/decide", "g"),
        Call(
            tuple(Alternative(name, (y, rows, copied), _cost(*cost)) for name, cost in COSTS.items()),
            "gate/copy",
            "g",
            (rows, None, None),
        ),
        Call(
            (
                Alternative("copy_few", (y, rows, copied), expensive),
                Alternative("copy_many", (y, rows, copied), cheap, only=7),
            ),
            "gate/exact",
            "g",
            (None, None, rows),
        ),
        Call(
            tuple(
                Alternative(name, (y, rows, copied), _cost(first, 0.0, *wait)) for name, (first, *wait) in WAITS.items()
            ),
            "gate/wait",
            "g",
            (None, rows, None),
        ),
        Call((Alternative("who", (ran[0],), expensive),), "who/expensive"),
        Call((Alternative("who", (ran[1],), cheap),), "who/cheap"),
        Call((Alternative("who_alone", (ran[2],)),), "who/alone"),
    ]
    outputs = [
        Port("y", "float32", (1, CHANNELS), y),
        Port("total", "float32", (CHANNELS,), total),
        Port("pair", "float32", (2, CHANNELS // 2), double),
        Port("kept", "float32", (CHANNELS,), after),
        Port("copied", "float32", (CHANNELS,), copied),
        Port("probe.g.action", "int64", (1, CHANNELS), action),
        Port("probe.g.tiles", "bool", (1, 2, 2), tiles),
        *(Port(f"ran{i}", "int32", (MOST_THREADS + 1,), place) for i, place in enumerate(ran)),
    ]
    inputs = [Port("x", "float32", (1, CHANNELS), x)]
    return Plan(inputs, outputs, calls, arena=8192, state=4096, flip=1024, threads=MOST_THREADS)


def sample_kernels() -> list[Kernel]:
    """The kernels of `sample_plan`."""
    copies = [copy_listed(name) for name in COSTS]
    return [relu(), add(), decide(), *copies, who("who"), who("who_alone", splits=False)]


def sample_weights() -> bytes:
    """The weights of `sample_plan`: how many channels there are."""
    return struct.pack("<16i", CHANNELS, *[0] * 15)


@cache
def sample_network(target: str = catalogue.HOST) -> Network:
    """The sample network for a target of the catalogue."""
    machine = host_machine() if target == catalogue.HOST else machine_of(catalogue.load(target).cpu)
    return network(sample_plan(), sample_kernels(), sample_weights(), machine)


def network(plan: Plan, kernels: list[Kernel], weights: bytes, machine: Machine) -> Network:
    """Compile, link and write a plan; the library of another machine than this one is left out."""
    objects, table = compile_kernels(kernels, machine), link.kernel_table(kernels)
    identity = link.library_id(objects, table, machine)
    data = plan_bytes(plan, table, identity, weights)
    library = link.link_library(objects, table, machine) if machine == host_machine() else b""
    return Network(library, data, weights, objects, table, machine)


def write_runner(net: Network, folder: Path, given: np.ndarray) -> list[str]:
    """Write the runner and its files into `folder` and return the command that measures `given`."""
    runner = folder / "runner"
    runner.write_bytes(link.link_runner(net.objects, net.table, net.machine))
    runner.chmod(0o755)
    (folder / "plan").write_bytes(net.plan)
    (folder / "weights").write_bytes(net.weights)
    (folder / "frames").write_bytes(given.tobytes())
    files = [str(folder / name) for name in ("runner", "plan", "weights")]
    return [*files, "--frames", str(folder / "frames"), "--dump", str(folder / "dump")]


def fixed(plan: bytes) -> bytes:
    """A changed plan with its checksum and length made right again."""
    head = bytearray(plan)
    head[16:24] = struct.pack("<Q", len(plan))
    head[24:28] = struct.pack("<I", zlib.crc32(bytes(plan[HEADER_BYTES:])))
    return bytes(head)


def frames(count: int) -> np.ndarray:
    """Frames `[count, 1, CHANNELS]`: about `step / count` of the channels are positive."""
    rng = np.random.default_rng(3)
    values = np.abs(rng.standard_normal((count, 1, CHANNELS))) + 0.1
    signs = np.where(rng.random(values.shape) < np.arange(count).reshape(-1, 1, 1) / count, 1, -1)
    return (values * signs).astype(np.float32)


def expected(given: np.ndarray) -> list[dict[str, np.ndarray]]:
    """What the sample network returns for a fresh stream of frames, by its text; `ran*` left out."""
    total, copied, before = (np.zeros(CHANNELS, np.float32) for _ in range(3))
    results = []
    for frame in given:
        y = np.maximum(frame[0], 0)
        total, kept = total + y, y + y
        copied = np.where(y > 0, y, copied)
        results.append(
            {
                "y": y[None],
                "total": total,
                "pair": (before + kept).reshape(2, -1),
                "kept": kept,
                "copied": copied,
                "probe.g.action": np.where(y > 0, 2, 0)[None],
                "probe.g.tiles": (y[:4] > 0).reshape(1, 2, 2),
            }
        )
        before = kept
    return results


slow_once = pytest.mark.slow
"""The compiler builds a C library for a processor it has not linked for yet: up to a minute each."""


def assert_expected(results: list[dict[str, np.ndarray]], given: np.ndarray) -> None:
    for result, right in zip(results, expected(given), strict=True):
        for name, value in right.items():
            assert result[name].dtype == value.dtype, name
            np.testing.assert_allclose(result[name], value, rtol=1e-6, err_msg=name)
