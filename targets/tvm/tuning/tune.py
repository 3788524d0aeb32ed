"""Measure what the convolution kernels cost on this machine.

The kernels run as they do in a network: from a plan, on one thread, one after the other. A step is every sample
once, in a random order, much other memory is touched before it, as by a network's other layers, and its input has just
been written. A sample's time is its least over many steps: whatever else runs on the machine only ever adds to it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dvexport.targets.tvm.build.compile import compile_kernels
from dvexport.targets.tvm.build.link import kernel_table, library_id, link_library
from dvexport.targets.tvm.calls.costs import Cost, TileVectors, direct_cost, tile_vectors, winograd_cost
from dvexport.targets.tvm.kernels.abi import Kernel
from dvexport.targets.tvm.kernels.conv import direct, direct_data, winograd, winograd_lists
from dvexport.targets.tvm.kernels.conv.direct import DirectConv
from dvexport.targets.tvm.kernels.conv.direct_data import Runs, Shape, Window
from dvexport.targets.tvm.kernels.conv.winograd import WinogradConv
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.kernels.planes import elementwise
from dvexport.targets.tvm.machine.dtype import F32, LINE_BYTES
from dvexport.targets.tvm.machine.machine import Machine
from dvexport.targets.tvm.plan import Call, Place, Plan, Port, Space, Variant
from dvexport.targets.tvm.plan_file import plan_bytes
from dvexport.targets.tvm.session import NativeSession

__all__ = ["LAYERS", "Layer", "Sample", "Way", "Work", "draw_works", "measure", "time_ways", "ways_of"]

Progress = Callable[[str], None]

_FEWEST_STEPS = 5

_CLEARED = ("others", "R", "Y", "X")
"""What is cleared before a sample: memory, as other layers of a network touch it, so that no weights are left in the
caches of the core; then the images that it has just used, the input last."""

_OTHERS = 8 << 20
"""Floats."""


@dataclass(frozen=True)
class Layer:
    """A convolution of a network, square all around.

    Attributes:
        kernel, stride: of its windows; padded so that a stride of 1 keeps the size.
        cin, cout: channels.
        size: edge of its output in pixels.
        cells: edge of its gate's grid; None: nobody chooses among pixels.
        residual: another image is added.
    """

    kernel: int
    stride: int
    cin: int
    cout: int
    size: int
    cells: int | None = None
    residual: bool = False

    @property
    def window(self) -> Window:
        """The geometry."""
        pad = self.kernel // 2
        return Window((self.kernel, self.kernel), (self.stride, self.stride), (pad, pad))

    @property
    def planes(self) -> tuple[Plane, Plane]:
        """Layout of a channel of the input and of the output."""
        pad = max(1, self.kernel // 2)
        return Plane((self.size * self.stride,) * 2, pad), Plane((self.size,) * 2, pad)


LAYERS = (
    # ResNet-18: its first layer, blocks with gates for tiles and for channels alone, and the ways between its stages.
    Layer(7, 2, 3, 64, 112),
    *[Layer(3, 1, c, c, s, 7, residual) for c, s in ((64, 56), (128, 28), (256, 14)) for residual in (False, True)],
    Layer(3, 1, 512, 512, 7, 7, True),
    *[Layer(3, 1, c, c, s, None, True) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))],
    *[Layer(3, 2, c, 2 * c, s, 7) for c, s in ((64, 28), (128, 14), (256, 7))],
    *[Layer(3, 2, c, 2 * c, s) for c, s in ((64, 28), (256, 7))],
    *[Layer(1, 2, c, 2 * c, s) for c, s in ((64, 28), (128, 14), (256, 7))],
    # Half as wide.
    *[Layer(3, 1, c, c, s, 7) for c, s in ((32, 56), (64, 28), (128, 14), (256, 7))],
    # ResNet-50.
    *[Layer(1, 1, 4 * c, c, s, 7) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))],
    *[Layer(1, 1, c, 4 * c, s, 7, True) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))],
    *[Layer(1, 1, 4 * c, c, s) for c, s in ((64, 56), (128, 28))],
    *[Layer(1, 1, c, 4 * c, s, None, True) for c, s in ((64, 56), (256, 14))],
)
"""Layers of ResNet at 224 x 224."""


@dataclass(frozen=True)
class Work:
    """What a sample computes: a layer with some of its channels and pixels. Two kernels do the same work.

    Attributes:
        rows, columns: output and input channels, ascending.
        cells: whether each cell of the grid is computed.
    """

    layer: Layer
    rows: np.ndarray
    columns: np.ndarray
    cells: np.ndarray


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
        if isinstance(self.spec, DirectConv):
            return direct_cost(self.spec, self.taps, self.inputs, machine)
        return winograd_cost(self.spec, self.per, self.inputs, machine)


def draw_works(layers: Sequence[Layer] = LAYERS, count: int = 12, seed: int = 0) -> list[Work]:
    """Return `count` amounts of work for each layer: all of it, then random ones, from one channel or cell to all."""
    rng = np.random.default_rng(seed)
    return [_draw(layer, index == 0, rng) for layer in layers for index in range(count)]


def _draw(layer: Layer, whole: bool, rng: np.random.Generator) -> Work:
    def subset(count: int) -> np.ndarray:
        few = round(count ** rng.random())  # half by size, half by order of magnitude
        chosen = count if whole else few if rng.random() < 0.5 else int(rng.integers(1, count + 1))
        return np.sort(rng.permutation(count)[:chosen])

    cells = np.zeros((layer.cells or 1) ** 2, bool)
    cells[subset(cells.size)] = True
    return Work(layer, subset(layer.cout), subset(layer.cin), cells)


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
    ways = [way for index, work in enumerate(works) for way in ways_of(index, work, machine)]
    return time_ways(ways, machine, seconds, tell)


def time_ways(ways: Sequence[Way], machine: Machine, seconds: float, tell: Progress) -> list[Sample]:
    """Return the samples of calls with their times; see `measure`."""
    order = np.random.default_rng(1).permutation(len(ways))
    tell("compile and link")
    with _open([ways[index] for index in order], machine, tell) as session:
        tell(f"measure {len(ways)} samples for {seconds:g} s")
        least = dict(zip(order, _least_times(session, seconds), strict=True))
    return [replace(way.sample, seconds=least[index]) for index, way in enumerate(ways)]


def _least_times(session: NativeSession, seconds: float) -> list[float]:
    """Return the least time of every sample's call, those that touch images left out."""
    feeds = {name: np.zeros([int(size) for size in port.shape], port.dtype) for name, port in session.inputs.items()}
    times: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(times) < _FEWEST_STEPS or time.perf_counter() < end:
        session.run(feeds)
        times.append([call.seconds for call in session.end_profile().pop()[len(_CLEARED) :: len(_CLEARED) + 1]])
    return [float(value) for value in np.min(times, axis=0)]


@dataclass(frozen=True)
class Way:
    """A kernel's call for a sample.

    Attributes:
        memory: floats of working memory, by buffer.
        weights: floats of weights, by buffer.
        constants: the rest.
    """

    sample: Sample
    layer: Layer
    kernel: Kernel
    memory: dict[str, int]
    weights: dict[str, int]
    constants: dict[str, np.ndarray]


@functools.cache
def _kernel(spec: DirectConv | WinogradConv, machine: Machine) -> Kernel:
    if isinstance(spec, DirectConv):
        return direct.direct_conv(spec, machine)
    return winograd.winograd_conv(spec, machine)


def ways_of(index: int, work: Work, machine: Machine) -> Iterator[Way]:
    """Yield the calls of every kernel that can do a work, the direct one first."""
    layer = work.layer
    x, y = layer.planes
    channels, window = (layer.cin, layer.cout), layer.window
    runs = _runs(layer, machine)
    spec = direct.spec_for(window, runs, channels, machine, residual=layer.residual, relu=True)
    vectors = runs.vectors(machine.lanes)
    how = {**spec.memory(machine), "vectors": vectors}
    run_list = direct_data.run_list(runs, work.cells, machine)
    counts = (len(work.rows), len(work.columns), int(run_list[0]))
    memory = {"others": _OTHERS, "X": layer.cin * x.size, "R": layer.cout * y.size, "Y": layer.cout * y.size}
    shared = {"rows": _listed(work.rows), "cols": _listed(work.columns), "inside": y.inside()}
    shape = direct_data.direct_shape(x, y, window, channels, **how)
    yield Way(
        Sample(index, spec, window.size, TileVectors(), layer.cin, counts),
        layer,
        _kernel(spec, machine),
        {**memory, "scratch": direct_data.scratch_floats(window.size, layer.cin, 1, **how)},
        {"W": layer.cout * int(shape[Shape.W_ROW]), "B": layer.cout},
        {**shared, "runs": run_list, "shape": shape},
    )
    grid = None if layer.cells is None else (layer.cells, layer.cells)
    tiled = None
    if layer.kernel == 3 and layer.stride == 1:
        tiled = winograd.spec_for(x, y, grid, machine, residual=layer.residual, relu=True)
    if tiled is None:
        return
    tiles = _tiles(layer, tiled.m)
    part = winograd.part_floats(tiled, layer.cin, -(-len(tiles.outputs) // machine.lanes), machine)
    yield Way(
        Sample(
            index,
            tiled,
            window.size,
            tile_vectors(np.diff(tiles.starts).tolist(), vectors, machine.lanes),
            layer.cin,
            counts,
        ),
        layer,
        _kernel(tiled, machine),
        {**memory, "scratch": part},
        {"U": layer.cout * winograd_lists.row_floats(tiled.m, layer.cin), "B": layer.cout},
        {
            **shared,
            "tiles": direct_data.run_list(tiles, work.cells, machine),
            "shape": winograd_lists.winograd_shape(tiled.m, x, y, layer.cin, part),
        },
    )


def _runs(layer: Layer, machine: Machine) -> Runs:
    if layer.cells is None:
        return direct_data.dense_runs(*layer.planes, layer.window, machine)
    return direct_data.tile_runs(*layer.planes, layer.window, (layer.cells, layer.cells), machine)


def _tiles(layer: Layer, m: int) -> Runs:
    """Return the Winograd tiles of every cell, as runs of one lane."""
    x, y = layer.planes
    cells = layer.cells or 1
    table = winograd_lists.tile_cells(x, y, (cells, cells), m)
    assert table is not None
    starts, offsets = table[: cells**2 + 1], table[cells**2 + 1 :].reshape(2, -1)
    return Runs(1, False, starts, *offsets)


def _listed(channels: np.ndarray) -> np.ndarray:
    return np.array([len(channels), *channels], np.int32)


def _open(ways: Sequence[Way], machine: Machine, tell: Progress) -> NativeSession:
    """Open a plan of all calls in order, each after those that touch its images."""
    clear = elementwise.clear(machine)
    kernels = [clear, *(way.kernel for way in ways)]
    objects, table = compile_kernels(kernels, machine, tell), kernel_table(kernels)
    memory, constants = _Memory(ways), _Constants()
    calls = []
    for way in ways:
        for name in _CLEARED:
            shape = constants.place(elementwise.elementwise_shape(way.memory[name]))
            calls.append(Call((Variant(clear.name, (shape, memory.place(name, way))),), name))
        places = {
            **{name: memory.place(name, way) for name in way.memory},
            **{name: constants.weights((way.layer, name), count) for name, count in way.weights.items()},
            **{name: constants.place(array) for name, array in way.constants.items()},
        }
        calls.append(Call((Variant(way.kernel.name, tuple(places[name] for name in way.kernel.buffers)),), "sample"))
    port = Place(Space.ARENA, 0, F32.bytes)
    plan = Plan([Port("x", F32.numpy, (1,), port)], [Port("y", F32.numpy, (1,), port)], calls, arena=memory.size)
    weights, identity = constants.file(), library_id(objects, table, machine)
    data = plan_bytes(plan, table, identity, weights)
    return NativeSession(link_library(objects, table, machine), data, weights, profile=True)


class _Memory:
    """Working memory: each buffer has one place, whatever the call, as in a network whose images share theirs."""

    def __init__(self, ways: Sequence[Way]) -> None:
        self._offsets, self.size = {}, 0
        for name in dict.fromkeys(name for way in ways for name in way.memory):
            self._offsets[name] = self.size
            self.size += _up(max(way.memory.get(name, 0) for way in ways) * F32.bytes)

    def place(self, name: str, way: Way) -> Place:
        """Return where a call's buffer is."""
        return Place(Space.ARENA, self._offsets[name], way.memory[name] * F32.bytes)


class _Constants:
    """The weights file: lists and sizes, and weights that every call of a layer shares."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._weights: dict[object, Place] = {}

    def place(self, array: np.ndarray) -> Place:
        """Return where a constant is."""
        data = array.tobytes()
        place = Place(Space.WEIGHTS, len(self._data), len(data))
        self._data += data + b"\0" * (_up(len(data)) - len(data))
        return place

    def weights(self, key: tuple[Layer, str], count: int) -> Place:
        """Return where a layer's weights are; what they are does not change the time."""
        if key not in self._weights:
            self._weights[key] = self.place(np.full(count, 1 / count, F32.array))
        return self._weights[key]

    def file(self) -> bytes:
        """Return the file; vector loads may read past the last weight."""
        return bytes(self._data) + b"\0" * LINE_BYTES


def _up(size: int) -> int:
    return -(-size // LINE_BYTES) * LINE_BYTES
