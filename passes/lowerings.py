"""The lowerings of a gate: when each is legal, what it is expected to cost, and whose decisions its work follows.

They stand in one table in order of preference; a name that a user, a manifest or a cost table gives is looked up there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import onnx_ir as ir

from dvexport.dialect.conv import plane_size
from dvexport.dialect.spec import operator_of, specification
from dvexport.graph.graph import DV, static_shape
from dvexport.graph.match import is_op
from dvexport.passes.tiles.winograd import WINOGRAD_STEPS, winograd_applies

__all__ = [
    "KERNELS",
    "LOWERINGS",
    "MASKED",
    "Abilities",
    "ConvShape",
    "CostPoint",
    "CostTable",
    "Lowering",
    "Shares",
    "choose",
    "convs_lowered_as",
    "lowering_of",
    "names",
    "takes_lowering",
]

MASKED = "masked"
"""What is always legal: everything is computed, then masked."""
KERNELS = "kernels"
"""What `ChooseKernels` says of a gate: no lowering, the backend has kernels for it."""

_KEY = "dv.lowering"
_CONV = "SparseConv"
"""What is computed of a gated convolution, the operator that costs are measured of."""
_DEFAULT_RATE = 0.5


def lowering_of(node: ir.Node) -> str:
    """Return the lowering chosen for a dialect node's gate."""
    return node.metadata_props.get(_KEY, MASKED)


def choose(node: ir.Node, lowering: str) -> None:
    """Set the lowering of a dialect node's gate."""
    node.metadata_props[_KEY] = lowering


def takes_lowering(node: ir.Node) -> bool:
    """Tell whether a node's work is governed by a gate that is given a lowering."""
    operator = operator_of(node)
    return operator is not None and bool(operator.part)


class CostPoint(Protocol):
    """A measured point: `size` is `ConvShape` and the percentage computed."""

    kernel: str
    size: str | list[int]
    ms: float
    threads: int


def convs_lowered_as(model: ir.Model, lowering: str) -> list[ir.Node]:
    """Return the `SparseConv` nodes of gates whose choice is `lowering`."""
    return [node for node in model.graph if is_op(node, _CONV, domain=DV) and lowering_of(node) == lowering]


@dataclass(frozen=True)
class ConvShape:
    """What a convolution's cost depends on; `cell` is the tile's mean height in output pixels."""

    cin: int
    cout: int
    size: int
    kernel: int
    stride: int
    cell: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense convolution on one frame."""
        return self.cin * self.cout * self.kernel**2 * self.size**2

    def distance(self, other: ConvShape) -> float:
        """How unlike another shape it is, in octaves; kernel and stride weigh most."""
        pairs = ((self.cin, other.cin), (self.cout, other.cout), (self.size, other.size), (self.cell, other.cell))
        near = sum(abs(math.log2(a / b)) for a, b in pairs)
        return near + 4 * (self.kernel != other.kernel) + 2 * (self.stride != other.stride)


@dataclass(frozen=True)
class Abilities:
    """What a target can run: `conditional` is `lazy` or `eager`; see the device catalogue."""

    conditional: str = "lazy"
    dynamic_shapes: bool = True


@dataclass(frozen=True)
class Shares:
    """A gate's expected rates, 0 to 1: tiles active, channels computed, channels not skipped.

    `groups` is the share of channels in groups that have any active channel: one, unless calibration says less.
    `owed` is the share of tiles that only the previous frame's history needs (`split_paths`).
    """

    tiles: float = _DEFAULT_RATE
    compute: float = _DEFAULT_RATE
    active: float = _DEFAULT_RATE
    groups: float = 1.0
    owed: float = 0.0


class CostTable:
    """Measured times by lowering, shape and rate.

    Args:
        points: sizes are `[cin, cout, size, kernel, stride, cell, percent]`, times in ms.
        threads: which points to use; those of the nearest count measured.
    """

    def __init__(self, points: Iterable[CostPoint], threads: int = 1) -> None:
        points = list(points)
        threads = min({point.threads for point in points}, key=lambda n: (abs(n - threads), n), default=threads)
        self._curves: dict[str, dict[ConvShape, dict[int, float]]] = {}
        for point in points:
            if point.threads != threads or isinstance(point.size, str) or len(point.size) != 7:
                continue
            curve = self._curves.setdefault(point.kernel, {}).setdefault(ConvShape(*point.size[:6]), {})
            curve[point.size[6]] = point.ms

    def expected(self, lowering: str, shape: ConvShape, rate: float) -> float | None:
        """Return the expected milliseconds, or None where nothing like it was measured."""
        curves = self._curves.get(lowering)
        if not curves:
            return None
        near = min(curves, key=shape.distance)
        points = sorted(curves[near].items())
        scale = shape.macs / near.macs
        return scale * _interpolate(points, 100 * rate)


def _interpolate(points: list[tuple[int, float]], at: float) -> float:
    below = max((p for p in points if p[0] <= at), default=points[0])
    above = min((p for p in points if p[0] >= at), default=points[-1])
    if below[0] == above[0]:
        return below[1]
    share = (at - below[0]) / (above[0] - below[0])
    return below[1] + share * (above[1] - below[1])


class Lowering:
    """One way to lower a gate; this one masks: everything is computed.

    Attributes:
        name: as users, manifests and cost tables give it.
        parts: the operators that it lowers (`Operator.part`), empty for a lowering that serves every gate.
        follows: the input of a gated operator that its work follows, nothing if it follows none.
        fallback: whether it may be chosen without measured costs.
    """

    parts: ClassVar[tuple[str, ...]] = ()
    follows: ClassVar[str] = ""
    fallback: ClassVar[bool] = True

    def __init__(self, name: str) -> None:
        self.name = name

    def why_not(self, nodes: list[ir.Node], abilities: Abilities) -> str | None:
        """Return why the gate of these nodes can't be lowered so, None if it can."""
        for operator in map(specification, nodes):
            if self.parts and operator.part not in self.parts:
                return f"it has no way to compute a part of {operator.name}"
        return self.obstacle(nodes, abilities)

    def obstacle(self, nodes: list[ir.Node], abilities: Abilities) -> str | None:
        """Return what is in the way with nodes that it lowers, None if nothing."""
        return None

    def expected(self, nodes: list[ir.Node], rates: Shares, costs: CostTable) -> float | None:
        """Return the expected milliseconds of a frame, None where nothing like it was measured."""
        total = 0.0
        for node in nodes:
            if specification(node).part != _CONV:
                return None
            for rate in self.rates(node, rates):
                ms = costs.expected(self.kernel(node), _shape_of(node), rate)
                if ms is None:
                    return None
                total += ms
            total += self.owed(node, rates.owed, costs)
        return total

    def kernel(self, node: ir.Node) -> str:
        """Return the name in the cost table of what a node becomes."""
        return self.name

    def rates(self, node: ir.Node, rates: Shares) -> list[float]:
        """Return the rate of each convolution that a node becomes. A history is one or two more (`split_paths`)."""
        return [1.0]

    def owed(self, node: ir.Node, rate: float, costs: CostTable) -> float:
        """Return what a history adds that `rates` does not count."""
        return 0.0


class _Tiles(Lowering):
    """Active tiles as matrix products, Winograd's where `step` is given and a convolution allows it."""

    parts = (_CONV,)
    follows = "tiles"

    def __init__(self, name: str, step: int | None = None) -> None:
        super().__init__(name)
        self.step = step

    def obstacle(self, nodes: list[ir.Node], abilities: Abilities) -> str | None:
        if not abilities.dynamic_shapes:
            return _NO_DYNAMIC_SHAPES
        for node in nodes:
            tiles = specification(node).bind(node)["tiles"]
            if tiles is None:
                return "the gate has no tile mask"
            grid, size = static_shape(tiles)[1:], plane_size(node.outputs[0])
            if grid[0] > size[0] or grid[1] > size[1]:
                return f"a grid of {grid[0]} x {grid[1]} is finer than its plane of {size[0]} x {size[1]}"
        if self.step and not any(_winograd_fits(node, self.step) for node in nodes):
            return f"no 3x3 convolution of stride 1 has even tiles that {self.step} divides"
        return None

    def kernel(self, node: ir.Node) -> str:
        """A Winograd gate's other convolutions use plain tile products."""
        return _PLAIN_TILES if self.step and not _winograd_fits(node, self.step) else self.name

    def rates(self, node: ir.Node, rates: Shares) -> list[float]:
        return [rates.tiles]

    def owed(self, node: ir.Node, rate: float, costs: CostTable) -> float:
        """The tiles owed by a history are plain products (`lower_tiles`).

        With none it costs what every measured point includes, since the blocks measured have histories.
        """
        if not _has_history(node):
            return 0.0
        some, none = (costs.expected(_PLAIN_TILES, _shape_of(node), at) for at in (rate, 0.0))
        return max(0.0, some - none) if some is not None and none is not None else 0.0


class _Channels(Lowering):
    """Chosen rows of the weight, gathered."""

    parts = (_CONV,)
    follows = "action"

    def obstacle(self, nodes: list[ir.Node], abilities: Abilities) -> str | None:
        lacking = self.lacking(abilities)
        if lacking is not None:
            return lacking
        if not any(specification(node).bind(node)["action"] is not None for node in nodes):
            return "the gate has no channel actions"
        if static_shape(nodes[0].outputs[0])[0] != 1:
            return "frames of a clip choose different channels"
        return None

    def lacking(self, abilities: Abilities) -> str | None:
        """Return what the target lacks, None if nothing."""
        return None if abilities.dynamic_shapes else _NO_DYNAMIC_SHAPES

    def rates(self, node: ir.Node, rates: Shares) -> list[float]:
        now = rates.compute if specification(node).bind(node)["action"] is not None else rates.active
        return [now] + [0.0] * _histories(node)  # `compute` counts what is owed; each history has its own fixed cost


class _Groups(_Channels):
    """A conditional for each group of channels."""

    fallback = False

    def lacking(self, abilities: Abilities) -> str | None:
        return None if abilities.conditional == "lazy" else "the target runs both branches of a conditional"

    def rates(self, node: ir.Node, rates: Shares) -> list[float]:
        """What is owed is scattered: its groups are computed whole as well."""
        return [rates.groups] * (1 + _histories(node))


_NO_DYNAMIC_SHAPES = "the target's runtime has no sizes known only at run time"
_PLAIN_TILES = "tiles"

LOWERINGS: Mapping[str, Lowering] = {
    each.name: each
    for each in (
        *(_Tiles(name, step) for name, step in WINOGRAD_STEPS.items()),
        _Tiles(_PLAIN_TILES),
        _Channels("channels"),
        _Groups("groups"),
        Lowering(MASKED),
    )
}
"""Every lowering by its name, the usual best first."""


def names(follows: str) -> tuple[str, ...]:
    """Return the names of the lowerings whose work follows an input of the gate."""
    return tuple(name for name, each in LOWERINGS.items() if each.follows == follows)


def _histories(node: ir.Node) -> int:
    return 0 if not _has_history(node) else 1 if specification(node).bind(node)["tiles"] is None else 2


def _has_history(node: ir.Node) -> bool:
    operator = specification(node)
    return operator.bind(node)["init_history"] is not None


def _shape_of(node: ir.Node) -> ConvShape:
    operator = specification(node)
    assert node.inputs[1] is not None
    cout, cin, kernel, _ = static_shape(node.inputs[1])
    _, _, height, width = static_shape(node.outputs[0])
    tiles = operator.bind(node)["tiles"]
    grid = static_shape(tiles)[1] if tiles is not None else 1
    stride = operator.attributes_of(node)["strides"][0]
    return ConvShape(cin, cout, round(math.sqrt(height * width)), kernel, stride, max(1, round(height / grid)))


def _winograd_fits(node: ir.Node, step: int) -> bool:
    operator = specification(node)
    assert node.inputs[1] is not None
    tiles = operator.bind(node)["tiles"]
    if tiles is None:
        return False
    grid = static_shape(tiles)[1:]
    return winograd_applies(
        plane_size(node.inputs[1]), operator.attributes_of(node), plane_size(node.outputs[0]), (grid[0], grid[1]), step
    )
