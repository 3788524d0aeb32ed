"""Measure what the convolution kernels cost on this machine.

The kernels run as they do in a network: from a plan, on one thread, one after the other. A step is every sample
once, in a random order, much other memory is touched before it, as by a network's other layers, and its input has just
been written. A sample's time is its least over many steps: whatever else runs on the machine only ever adds to it.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dvexport.targets.tvm.build.compile import compile_kernels
from dvexport.targets.tvm.build.link import kernel_table, library_id, link_library
from dvexport.targets.tvm.calls.call_list import CallList
from dvexport.targets.tvm.calls.conv_options import Option, options_of
from dvexport.targets.tvm.calls.costs import Cost, TileVectors, conv_cost
from dvexport.targets.tvm.calls.draft import ALGORITHMS
from dvexport.targets.tvm.calls.memory import FLOAT_BYTES, Buffer, Constants, Part
from dvexport.targets.tvm.calls.place import HostPort, place_calls
from dvexport.targets.tvm.kernels.conv import direct_data
from dvexport.targets.tvm.kernels.conv.direct import DirectConv
from dvexport.targets.tvm.kernels.conv.winograd import WinogradConv
from dvexport.targets.tvm.machine.dtype import F32
from dvexport.targets.tvm.machine.machine import Machine
from dvexport.targets.tvm.plan_file import plan_bytes
from dvexport.targets.tvm.session import NativeSession
from dvexport.targets.tvm.tuning.workloads import Work, Workload

__all__ = ["Sample", "Trial", "measure", "time_trials", "trials_of"]

Progress = Callable[[str], None]

_FEWEST_STEPS = 5

_CLEARED = ("others", "R", "Y", "X")
"""What is cleared before a sample: memory, as other layers of a network touch it, so that no weights are left in the
caches of the core; then the images that it has just used, the input last."""

_OTHERS = 8 << 20
"""Floats."""


@dataclass(frozen=True)
class Sample:
    """A kernel doing some work.

    Attributes:
        work: index of the work: equal where two kernels do the same.
        spec: the kernel's family.
        taps: pixels of a window.
        per: tiles' vectors by the direct kernel's; of a Winograd kernel.
        inputs: input channels of the layer.
        counts: output channels, input channels and vectors of the direct kernel.
        seconds: its least time; 0 before it is measured.
    """

    work: int
    spec: DirectConv | WinogradConv
    taps: int
    per: TileVectors
    inputs: int
    counts: tuple[int, int, int]
    seconds: float = 0.0

    def cost(self, machine: Machine) -> Cost:
        """Return its cost model."""
        return conv_cost(self.spec, self.taps, self.per, self.inputs, machine)


@dataclass(frozen=True)
class Trial:
    """A sample to be timed: the kernel and the work that it does."""

    sample: Sample
    option: Option
    work: Work


def measure(machine: Machine, works: Sequence[Work], seconds: float, tell: Progress) -> list[Sample]:
    """Return the time of every kernel for every work that it can do.

    Args:
        machine: this one.
        works: what to compute.
        seconds: how long to repeat; every sample runs five times at least.
        tell: called with the name of each step as it begins.

    Raises:
        DeviceError: a package of the extra `tvm` is missing, or this machine can't run the code.
    """
    tell("write kernels")
    trials = [trial for index, work in enumerate(works) for trial in trials_of(index, work, machine)]
    return time_trials(trials, machine, seconds, tell)


def trials_of(index: int, work: Work, machine: Machine) -> Iterator[Trial]:
    """Yield a trial of every kernel that can do any part of a work's layer, the direct one first."""
    layer = work.workload.layer
    options = [option for option in options_of(layer, machine, ALGORITHMS) if not option.only]
    vectors = int(direct_data.run_list(options[0].runs, work.cells, machine)[0])
    counts = len(work.rows), len(work.columns), vectors
    for option in options:
        sample = Sample(index, option.spec, layer.window.size, option.tiles, layer.channels[0], counts)
        yield Trial(sample, option, work)


def time_trials(trials: Sequence[Trial], machine: Machine, seconds: float, tell: Progress) -> list[Sample]:
    """Return the samples of trials with their times; see `measure`."""
    order = np.random.default_rng(1).permutation(len(trials))
    tell("compile and link")
    with _open([trials[index] for index in order], machine, tell) as session:
        tell(f"measure {len(trials)} samples for {seconds:g} s")
        least = dict(zip(order, _least_times(session, seconds), strict=True))
    return [replace(trial.sample, seconds=least[index]) for index, trial in enumerate(trials)]


def _least_times(session: NativeSession, seconds: float) -> list[float]:
    """Return the least time of every sample's call, those that touch images left out."""
    feeds = {name: np.zeros([int(size) for size in port.shape], port.dtype) for name, port in session.inputs.items()}
    times: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(times) < _FEWEST_STEPS or time.perf_counter() < end:
        session.run(feeds)
        times.append([call.seconds for call in session.end_profile().pop()[len(_CLEARED) :: len(_CLEARED) + 1]])
    return [float(value) for value in np.min(times, axis=0)]


def _open(trials: Sequence[Trial], machine: Machine, tell: Progress) -> NativeSession:
    """Open a plan of all trials in order, each after the calls that touch its images."""
    bench = _Bench(trials, machine)
    for trial in trials:
        bench.write(trial)
    calls = bench.calls
    port = Buffer("host", FLOAT_BYTES).part()
    inputs, outputs = ([HostPort(name, F32.numpy, (1,), port)] for name in "xy")
    plan = place_calls(calls, inputs, outputs, kept=bench.buffers.values()).plan
    objects, table = compile_kernels(calls.kernels.values(), machine, tell), kernel_table(calls.kernels.values())
    weights, identity = calls.constants.file(), library_id(objects, table, machine)
    data = plan_bytes(plan, table, identity, weights)
    return NativeSession(link_library(objects, table, machine), data, weights, profile=True)


class _Bench:
    """The plan of trials while it is written. Each buffer has one place, as in a network whose images share theirs.

    Attributes:
        calls: those written so far.
        buffers: by name, each as large as the largest trial needs it.
    """

    def __init__(self, trials: Sequence[Trial], machine: Machine) -> None:
        self.calls = CallList(machine, Constants())
        self._machine = machine
        self._weights: dict[tuple[Workload, int], Part] = {}
        sizes: dict[str, int] = {}
        for trial in trials:
            for name, floats in self._floats(trial).items():
                sizes[name] = max(sizes.get(name, 0), floats)
        self.buffers = {name: Buffer(name, floats * FLOAT_BYTES) for name, floats in sizes.items()}

    def write(self, trial: Trial) -> None:
        """Write what is cleared before a trial, and its call."""
        own = {name: self.buffers[name].part(0, floats * FLOAT_BYTES) for name, floats in self._floats(trial).items()}
        for name in _CLEARED:
            self.calls.clear(own[name], name)
        parts, kernel = {**own, **self._constants(trial)}, trial.option.kernel(self._machine)
        self.calls.call(kernel, [parts[name] for name in kernel.buffers], "conv sample")

    def _floats(self, trial: Trial) -> dict[str, int]:
        """Return the floats of working memory that a trial needs, by buffer."""
        layer = trial.option.layer
        cin, cout = layer.channels
        images = {"others": _OTHERS, "X": cin * layer.x.size, "R": cout * layer.y.size, "Y": cout * layer.y.size}
        return {**images, "scratch": max(1, trial.option.scratch(self._machine, threads=1))}

    def _constants(self, trial: Trial) -> dict[str, Part]:
        option, work, add = trial.option, trial.work, self.calls.constants.add
        key = work.workload, option.m
        if key not in self._weights:
            self._weights[key] = option.weights(_weights(work.workload), self.calls.constants)
        pixels = add(direct_data.run_list(option.runs, work.cells, self._machine))
        return {
            "W": self._weights[key], "U": self._weights[key], "B": add(np.zeros(work.workload.cout, np.float32)),
            "rows": add(_listed(work.rows)), "cols": add(_listed(work.columns)), "inside": add(option.layer.y.inside()),
            "runs": pixels, "tiles": pixels, "shape": add(option.shape(self._machine)),
        }  # fmt: skip


def _weights(workload: Workload) -> np.ndarray:
    """Return weights `[Cout, Cin, kh, kw]` that no other workload has: equal arrays would be stored once."""
    rng = np.random.default_rng(zlib.crc32(repr(workload).encode()))
    shape = workload.cout, workload.cin, workload.kernel, workload.kernel
    return rng.standard_normal(shape).astype(np.float32)


def _listed(channels: np.ndarray) -> np.ndarray:
    return np.array([len(channels), *channels], np.int32)
