"""Choose how each gate is lowered, from what the target can do and a measured cost table.

A gate's expected cost under a lowering is the sum over its convolutions of the time measured
on the target for the nearest shape, scaled by multiply-accumulates and interpolated at the gate's
expected rate (share of tiles or of channels computed). The cheapest legal lowering wins; masking everything
is always legal, so a gate that would cost more than it saves falls back to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import onnx_ir as ir

from dvexport.dialect.conv import plane_size
from dvexport.dialect.spec import operator_of, specification
from dvexport.errors import UsageError, unknown_name
from dvexport.graph.graph import DV, gate_name, static_shape
from dvexport.passes.tiles.winograd import WINOGRAD_STEPS, winograd_applies

__all__ = [
    "BY_CHANNEL",
    "BY_TILE",
    "KERNELS",
    "LOWERINGS",
    "Abilities",
    "Choice",
    "ChooseLowering",
    "ConvShape",
    "CostPoint",
    "CostTable",
    "Rates",
    "choose",
    "convs_lowered_as",
    "lowering_of",
]

BY_TILE = ("tiles", *WINOGRAD_STEPS)
"""Lowerings whose work follows the tile mask."""
BY_CHANNEL = ("channels", "groups")
"""Lowerings whose work follows the channel actions."""
LOWERINGS = ("masked", *BY_TILE, *BY_CHANNEL)
KERNELS = "kernels"
"""What `ChooseKernels` says of a gate: no lowering, the backend has kernels for it."""

_KEY = "dv.lowering"
_DEFAULT_RATE = 0.5


def lowering_of(node: ir.Node) -> str:
    """Return the lowering chosen for a dialect node's gate."""
    return node.metadata_props.get(_KEY, "masked")


def choose(node: ir.Node, lowering: str) -> None:
    """Set the lowering of a dialect node's gate."""
    node.metadata_props[_KEY] = lowering


class CostPoint(Protocol):
    """A measured point: `size` is `ConvShape` and the percentage computed."""

    kernel: str
    size: str | list[int]
    ms: float
    threads: int


def convs_lowered_as(model: ir.Model, lowering: str) -> list[ir.Node]:
    """Return the `SparseConv` nodes of gates whose choice is `lowering`."""
    return [
        node
        for node in model.graph
        if node.domain == DV and node.op_type == "SparseConv" and lowering_of(node) == lowering
    ]


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
class Rates:
    """A gate's expected rates, 0 to 1: tiles active, channels computed, channels not skipped.

    `groups` is the share of channels in groups that have any active channel: one, unless calibration says less.
    `owed` is the share of tiles that only the previous frame's history needs (`split_paths`).
    """

    tiles: float = _DEFAULT_RATE
    compute: float = _DEFAULT_RATE
    active: float = _DEFAULT_RATE
    groups: float = 1.0
    owed: float = 0.0


@dataclass(frozen=True)
class Choice:
    """What was chosen for a gate and why; `expected_ms` by lowering, of one frame."""

    gate: str
    lowering: str
    reason: str
    overridden: bool = False
    expected_ms: Mapping[str, float] = field(default_factory=dict)


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


class ChooseLowering(ir.passes.InPlacePass):
    """Mark every node of every gate with its lowering.

    Args:
        abilities: the target's.
        costs: its measured table; None chooses by ability alone, and says so.
        rates: expected rates by gate, from calibration; others are taken as one half.
        overrides: lowering by gate, or by `*` for all that allow it.

    Requires: gate level, frames fixed. Afterwards `choices` has one entry a gate.

    Raises:
        UsageError: an override names an unknown gate or lowering, or one that is not legal there.
    """

    def __init__(
        self,
        abilities: Abilities,
        costs: CostTable | None = None,
        rates: Mapping[str, Rates] | None = None,
        overrides: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.abilities, self.costs = abilities, costs
        self.rates, self.overrides = rates or {}, overrides or {}
        self.choices: list[Choice] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Choose gate by gate."""
        gates: dict[str, list[ir.Node]] = {}
        for node in model.graph:
            if node.domain == DV and node.op_type == "GatedConv":
                gates.setdefault(gate_name(node), []).append(node)
        self._check_overrides(gates)
        for gate, nodes in gates.items():
            choice = self._choose(gate, nodes)
            self.choices.append(choice)
            for node in nodes:
                choose(node, choice.lowering)
        return ir.passes.PassResult(model, bool(gates))

    def _check_overrides(self, gates: Mapping[str, list[ir.Node]]) -> None:
        for gate, lowering in self.overrides.items():
            if gate != "*" and gate not in gates:
                raise unknown_name("gate", gate, gates)
            if lowering not in LOWERINGS:
                raise unknown_name("lowering", lowering, LOWERINGS)

    def _choose(self, gate: str, nodes: list[ir.Node]) -> Choice:
        illegal = {name: _why_not(name, nodes, self.abilities) for name in LOWERINGS}
        legal = [name for name, why in illegal.items() if why is None]
        asked = self.overrides.get(gate)
        if asked is not None and illegal[asked]:
            raise UsageError(f"gate '{gate}' can't be lowered as '{asked}'", why=illegal[asked],
                             hint=f"one of: {', '.join(legal)}")  # fmt: skip
        asked = asked or (self.overrides.get("*") if self.overrides.get("*") in legal else None)
        expected = {name: ms for name in legal if (ms := self._expected(name, gate, nodes)) is not None}
        if asked:
            return Choice(gate, asked, "asked for", True, expected)
        if len(legal) == 1:
            first = next(why for why in illegal.values() if why)
            return Choice(gate, "masked", f"nothing else is possible: {first}", False, expected)
        if "masked" not in expected or len(expected) == 1:
            best = next((name for name in ("winograd4", "winograd2", "tiles", "channels") if name in legal), "masked")
            return Choice(gate, best, "no measured costs for this target: the usual best", False, expected)
        best = min(expected, key=lambda name: expected[name])
        return Choice(gate, best, self._reason(best, gate, expected), False, expected)

    def _expected(self, lowering: str, gate: str, nodes: list[ir.Node]) -> float | None:
        if self.costs is None:
            return None
        rates = self.rates.get(gate, Rates())
        total = 0.0
        for node in nodes:
            for rate in _rates(lowering, node, rates):
                ms = self.costs.expected(_kernel(lowering, node), _shape_of(node), rate)
                if ms is None:
                    return None
                total += ms
            total += self._owed(lowering, node, rates.owed)
        return total

    def _owed(self, lowering: str, node: ir.Node, rate: float) -> float:
        """What the tiles owed by a history add: plain products (`lower_tiles`).

        With none it costs what every measured point includes, since the blocks measured have histories.
        """
        if lowering not in BY_TILE or not _has_history(node):
            return 0.0
        assert self.costs is not None
        shape = _shape_of(node)
        some, none = (self.costs.expected("tiles", shape, at) for at in (rate, 0.0))
        return max(0.0, some - none) if some is not None and none is not None else 0.0

    def _reason(self, best: str, gate: str, expected: Mapping[str, float]) -> str:
        known = "calibrated" if gate in self.rates else "assumed"
        rates = self.rates.get(gate, Rates())
        at = f"{known}: {rates.tiles:.0%} of tiles, {rates.active:.0%} of channels"
        rest = [name for name in expected if name != best]
        others = ", ".join(f"{name} {expected[name]:.2f}" for name in sorted(rest, key=lambda n: expected[n])[:2])
        saved = "every other lowering costs more than it saves; " if best == "masked" else ""
        return f"{saved}{expected[best]:.2f} ms expected, {others} ({at})"


def _kernel(lowering: str, node: ir.Node) -> str:
    """A Winograd gate's other convolutions use plain tile products."""
    step = WINOGRAD_STEPS.get(lowering)
    return "tiles" if step and not _winograd_fits(node, step) else lowering


def _rates(lowering: str, node: ir.Node, rates: Rates) -> list[float]:
    """Return the rate of each convolution that a node becomes.

    A history is one or two more (`split_paths`); those on tiles are counted by `ChooseLowering._owed`.
    """
    operator = specification(node)
    inputs = operator.bind(node)
    if lowering in BY_TILE:
        return [rates.tiles]
    if lowering not in BY_CHANNEL:
        return [1.0]
    histories = 0 if not _has_history(node) else 1 if inputs["tiles"] is None else 2
    if lowering == "groups":  # what is owed is scattered: its groups are computed whole as well
        return [rates.groups] * (1 + histories)
    now = rates.compute if inputs["action"] is not None else rates.active
    return [now] + [0.0] * histories  # `compute` counts what is owed; each history has its own fixed cost


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


def _why_not(lowering: str, nodes: list[ir.Node], abilities: Abilities) -> str | None:
    """Return why a gate can't be lowered so, or None if it can."""
    if lowering == "masked":
        return None
    if lowering in BY_TILE:
        return _why_not_tiles(lowering, nodes, abilities)
    return _why_not_channels(lowering, nodes, abilities)


def _why_not_tiles(lowering: str, nodes: list[ir.Node], abilities: Abilities) -> str | None:
    if not abilities.dynamic_shapes:
        return "the target's runtime has no sizes known only at run time"
    for node in nodes:
        operator = specification(node)
        tiles = operator.bind(node)["tiles"]
        if tiles is None:
            return "the gate has no tile mask"
        grid, size = static_shape(tiles)[1:], plane_size(node.outputs[0])
        if grid[0] > size[0] or grid[1] > size[1]:
            return f"a grid of {grid[0]} x {grid[1]} is finer than its plane of {size[0]} x {size[1]}"
    step = WINOGRAD_STEPS.get(lowering)
    if step and not any(_winograd_fits(node, step) for node in nodes):
        return f"no 3x3 convolution of stride 1 has even tiles that {step} divides"
    return None


def _why_not_channels(lowering: str, nodes: list[ir.Node], abilities: Abilities) -> str | None:
    if lowering == "channels" and not abilities.dynamic_shapes:
        return "the target's runtime has no sizes known only at run time"
    if lowering == "groups" and abilities.conditional != "lazy":
        return "the target runs both branches of a conditional"
    operators = [(operator_of(node), node) for node in nodes]
    if not any(op is not None and op.bind(node)["action"] is not None for op, node in operators):
        return "the gate has no channel actions"
    if static_shape(nodes[0].outputs[0])[0] != 1:
        return "frames of a clip choose different channels"
    return None
