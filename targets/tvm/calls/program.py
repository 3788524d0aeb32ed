"""A step being written: where values lie, and the calls so far.

Images are held as planes (`layout.py`), everything else flat. A value that is wanted in the other form is
converted once. States are placed first: a state that is only ever overwritten in parts (the computed output that a gate
keeps) stays where it is; one that is rewritten whole has two halves that change places after every step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from dvexport.dialect.spec import operator_of
from dvexport.graph.graph import DV, array_of, static_shape
from dvexport.graph.state import State, states_of
from dvexport.targets.tvm.calls.memory import Buffer, Constants, Part, lower_bound, place_buffers
from dvexport.targets.tvm.kernels.abi import Kernel
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.kernels.planes import elementwise, planes
from dvexport.targets.tvm.machine.dtype import F32
from dvexport.targets.tvm.machine.machine import Machine
from dvexport.targets.tvm.plan import COST_TERMS, Call, Place, Plan, Port, Space, Variant
from dvexport.targets.tvm.units.cut import PLANAR_KINDS, ConvUnit
from dvexport.targets.tvm.units.unit import Unit

__all__ = ["ALGORITHMS", "Program", "Step", "Way"]

FLOAT_BYTES = F32.bytes
ALGORITHMS = ("direct", "winograd")

NO_COST = (0.0,) * COST_TERMS


@dataclass(frozen=True)
class Way:
    """A kernel with its arguments, its cost model and what it is for (`plan.Variant` before memory is placed)."""

    kernel: Kernel
    arguments: tuple[Part, ...]
    cost: tuple[float, ...] = NO_COST
    only: int = 0


@dataclass(frozen=True)
class Step:
    """A call before memory is placed."""

    ways: tuple[Way, ...]
    label: str
    gate: str
    counts: tuple[Part | None, Part | None, Part | None] = (None, None, None)

    @property
    def buffers(self) -> list[Buffer]:
        """Every buffer it names."""
        return [part.buffer for way in self.ways for part in way.arguments]


@dataclass
class _Forms:
    planes: Part | None = None
    flat: Part | None = None


@dataclass
class Program:
    """What is known of a step while it is written.

    Attributes:
        model: frames fixed.
        units: its units, in the order they will be written.
        machine: what kernels are generated for.
        constants: the weights file, shared by the variants of a model.
        algorithms: of convolutions, to choose from at run time; `direct` is always there.
        threads: the most that may share a step: scratch memory is laid out for as many.
        steps: the calls so far.
        kernels: every kernel called, by name.
        lists: lists made of decisions so far, by what they are (`decisions.py`).
    """

    model: ir.Model
    units: Sequence[Unit]
    machine: Machine
    constants: Constants
    algorithms: Collection[str] = ALGORITHMS
    threads: int = 1
    steps: list[Step] = field(default_factory=list)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    lists: dict[tuple[object, ...], Part] = field(default_factory=dict)
    _forms: dict[ir.Value, _Forms] = field(default_factory=dict)
    _reserved: dict[ir.Value, Buffer] = field(default_factory=dict)
    _layouts: dict[tuple[int, int], Plane] = field(default_factory=dict)
    _shared: set[Buffer] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Lay out images and place the states."""
        self._layouts = _layouts(self.units)
        self._planar: set[ir.Value] = set()
        for unit in self.units:
            if unit.kind in PLANAR_KINDS or (unit.kind == "copy" and unit.inputs[0] in self._planar):
                self._planar.update(unit.outputs)
        self._last = {value: i for i, unit in enumerate(self.units) for value in unit.inputs}
        by_name = {value.name: value for value in self.model.graph.inputs}
        outputs = {value.name: value for value in self.model.graph.outputs}
        self._states = states_of(self.model)
        for state in self._states:
            self._place_state(state, by_name[state.input], outputs[state.output])
        fed = {state.input for state in self._states}
        self.inputs = [value for value in self.model.graph.inputs if value.name not in fed]
        for value in self.inputs:
            self._forms[value] = _Forms(flat=Buffer(str(value.name), _bytes(value)).part())

    # Values

    def layout(self, value: ir.Value) -> Plane:
        """Return how an image's planes are laid out: all images of a size alike."""
        _, _, height, width = static_shape(value)
        return self._layouts.setdefault((height, width), Plane((height, width)))

    def planes(self, value: ir.Value) -> Part:
        """Return an image's planes, `[N * C]` of them."""
        constant = array_of(value)
        if constant is not None:
            return self.constants.add(self.layout(value).pack(constant), str(value.name))
        forms = self._of(value)
        if forms.planes is None:
            assert forms.flat is not None, value
            forms.planes = self._new(value, self._plane_bytes(value), self.layout(value))
            shape = planes.frame_shape(self._count(value), self.layout(value))
            arguments = [forms.flat, self.constants.add(shape), forms.planes]
            self.call(planes.load_frame(self.machine), arguments, f"load {value.name}", self.gate_of(value))
        return forms.planes

    def flat(self, value: ir.Value) -> Part:
        """Return a value as ONNX lays it out."""
        constant = array_of(value)
        if constant is not None:
            return self.constants.add(constant, str(value.name))
        forms = self._of(value)
        if forms.flat is None:
            assert forms.planes is not None, value
            forms.flat = self._new(value, _bytes(value))
            shape = planes.frame_shape(self._count(value), self.layout(value))
            arguments = [forms.planes, self.constants.add(shape), forms.flat]
            self.call(planes.store_planes(self.machine), arguments, f"store {value.name}", self.gate_of(value))
        return forms.flat

    def new_planes(
        self, value: ir.Value, *, fragile: bool = False, covered: bool = False, partial: bool = False
    ) -> Part:
        """Return memory for an image that is about to be written.

        Args:
            fragile: what writes it needs its padding to be zero already.
            covered: of a fragile one, what writes it writes the padding between rows too.
            partial: what writes it leaves some of its padding as it is, and nobody reads that.
        """
        part = self._home(value, self._plane_bytes(value))
        if value not in self._reserved and not partial:
            part.buffer.layout, part.buffer.fragile, part.buffer.covered = self.layout(value), fragile, covered
        self._forms[value] = _Forms(planes=part)
        return part

    def new_flat(self, value: ir.Value) -> Part:
        """Return memory for a value that is about to be written."""
        part = self._home(value, _bytes(value))
        self._forms[value] = _Forms(flat=part)
        return part

    def share(self, value: ir.Value, part: Part, *, flat: bool = False) -> None:
        """Say that a value is what lies at `part`; it is copied where the value has a place of its own."""
        home = self._reserved.get(value)
        self._shared.add(part.buffer)
        if home is not None and home is not part.buffer:
            self.copy(part, home.part(), f"{value.name}")
            part = home.part()
        self._forms[value] = _Forms(flat=part) if flat else _Forms(planes=part)

    def take_over(self, value: ir.Value, source: ir.Value) -> None:
        """Let a value have the memory of one that ends with it (`may_overwrite`)."""
        part = self._of(source).planes
        assert part is not None
        home = self._reserved.get(value)
        if home is not None and home is not part.buffer:
            self.copy(part, home.part(), str(value.name))
            part = home.part()
        self._forms[value] = _Forms(planes=part)

    def share_forms(self, value: ir.Value, source: ir.Value) -> None:
        """Say that a value is another one; a state takes the form that its place is for."""
        flat = self._of(source).planes is None if value not in self._reserved else value not in self._planar
        self.share(value, self.flat(source) if flat else self.planes(source), flat=flat)

    def frame(self, part: Part, frames: int, index: int) -> Part:
        """Return frame `index` of `frames` equal ones."""
        size = part.size // frames
        return part.part(index * size, size)

    def may_overwrite(self, value: ir.Value, unit: Unit) -> bool:
        """Tell whether a unit may write over a value it reads: nobody reads it later, under this or another name."""
        part = self._of(value).planes
        last = self.units[self._last[value]] is unit and not value.is_graph_output()
        return last and part is not None and part.buffer not in self._shared

    def reads_padding(self, value: ir.Value) -> bool:
        """Tell whether anybody needs an image's padding to be zero.

        Convolutions don't that stay inside the image, and what they add to their sums need not have any: they
        write no image of what they find in the padding.
        """
        readers = [unit for unit in self.units if value in unit.inputs]
        return value.is_graph_output() or not all(
            isinstance(unit, ConvUnit) and unit.base is not value and (unit.x is not value or not any(unit.pads))
            for unit in readers
        )

    def gate_of(self, value: ir.Value) -> str:
        """Return the gate of the unit that makes a value, or nothing."""
        return next((unit.gate for unit in self.units if value in unit.outputs), "")

    # Calls

    def call(self, kernel: Kernel, arguments: Sequence[Part], label: str, gate: str = "") -> None:
        """Write a call without a choice."""
        self.choose([Way(kernel, tuple(arguments))], label, gate)

    def choose(
        self,
        ways: Sequence[Way],
        label: str,
        gate: str = "",
        counts: tuple[Part | None, Part | None, Part | None] = (None, None, None),
    ) -> None:
        """Write a call with several ways to do it; see `plan.Call`."""
        for way in ways:
            assert len(way.arguments) == len(way.kernel.buffers), (way.kernel.name, way.kernel.buffers)
            self.kernels[way.kernel.name] = way.kernel
        self.steps.append(Step(tuple(ways), label, gate, counts))

    def copy(self, source: Part, target: Part, label: str, gate: str = "") -> None:
        """Copy bytes, rounded up to whole floats: buffers end on 64 bytes."""
        floats = -(-min(source.size, target.size) // FLOAT_BYTES)
        shape = self.constants.add(elementwise.copy_shape(floats))
        whole = [Part(each.buffer, each.offset, floats * FLOAT_BYTES) for each in (source, target)]
        arguments = [whole[0], shape, whole[1]]
        self.call(elementwise.copy(self.machine), arguments, f"copy {label}", gate)

    def clear(self, target: Part, label: str, gate: str = "") -> None:
        """Zero whole planes."""
        shape = self.constants.add(elementwise.elementwise_shape(target.size // FLOAT_BYTES))
        self.call(elementwise.clear(self.machine), [shape, target], f"clear {label}", gate)

    def scratch(self, floats: int, name: str = "scratch") -> Part:
        """Return memory that one call uses."""
        return Buffer(name, max(floats, 1) * FLOAT_BYTES).part()

    # The end

    def plan(self) -> Plan:
        """Place all memory and return the plan."""
        self._write_back()
        ports = {value: self.flat(value) for value in self._outputs()}
        for value, part in list(ports.items()):
            if part.buffer.space is not Space.ARENA:
                ports[value] = Buffer(str(value.name), part.size).part()
                self.copy(part, ports[value], str(value.name))
        uses = [step.buffers for step in self.steps]
        entry = [self._forms[value].flat.buffer for value in self.inputs]  # type: ignore[union-attr]
        uses.insert(0, entry)  # inputs are there before the first call
        kept = [part.buffer for part in ports.values()]
        placement = place_buffers(uses, kept)
        self.bound = lower_bound(uses, kept)
        self._clear_padding(placement.spoilt())

        def place(part: Part | None) -> Place | None:
            return None if part is None else placement.place(part, self.constants)

        calls = [
            Call(
                tuple(
                    Variant(
                        way.kernel.name, tuple(placement.place(a, self.constants) for a in way.arguments),
                        way.cost, way.only,
                    )
                    for way in step.ways
                ),
                step.label, step.gate, tuple(place(part) for part in step.counts),  # type: ignore[arg-type]
            )
            for step in self.steps
        ]  # fmt: skip
        return Plan(
            inputs=[_port(v, place(self._forms[v].flat)) for v in self.inputs],
            outputs=[_port(v, place(part)) for v, part in ports.items()],
            calls=calls, arena=placement.arena, state=placement.state, flip=placement.flip, threads=self.threads,
        )  # fmt: skip

    def _clear_padding(self, spoilt: Collection[Buffer]) -> None:
        """Before the first call that names a buffer whose padding others write, zero that."""
        waiting, steps = set(spoilt), self.steps
        self.steps = []
        for step in steps:
            for buffer in waiting.intersection(step.buffers):
                waiting.discard(buffer)
                assert buffer.layout is not None
                channels = buffer.size // buffer.layout.bytes
                kernel, shape = planes.zero_pads(self.machine), planes.frame_shape(channels, buffer.layout)
                if buffer.covered:
                    kernel, shape = planes.zero_ends(self.machine), planes.ends_shape(channels, buffer.layout)
                self.call(kernel, [self.constants.add(shape), buffer.part()], f"pad {buffer.name}", step.gate)
            self.steps.append(step)

    def _outputs(self) -> list[ir.Value]:
        written = {state.output for state in self._states}
        return [value for value in self.model.graph.outputs if value.name not in written]

    def _write_back(self) -> None:
        """Copy to its place every state that was made elsewhere (such as one that another output shares)."""
        outputs = {value.name: value for value in self.model.graph.outputs}
        for state in self._states:
            value = outputs[state.output]
            home, forms = self._reserved[value], self._of(value)
            part = forms.planes if value in self._planar else forms.flat
            assert part is not None, state
            if part.buffer is not home:
                self.copy(part, home.part(), state.name)

    def _place_state(self, state: State, read: ir.Value, write: ir.Value) -> None:
        planar = write in self._planar
        size = self._plane_bytes(write) if planar else _bytes(write)
        if _overwritten_in_place(read, write):
            before = after = Buffer(state.name, size, Space.STATE)
        else:
            before = Buffer(state.name, size, Space.BEFORE)
            after = Buffer(state.name, size, Space.AFTER, before)
        self._reserved[write] = after
        self._forms[read] = _Forms(planes=before.part()) if planar else _Forms(flat=before.part())

    def _of(self, value: ir.Value) -> _Forms:
        try:
            return self._forms[value]
        except KeyError:
            raise AssertionError(f"{value.name} is read before it is written") from None

    def _home(self, value: ir.Value, size: int) -> Part:
        home = self._reserved.get(value)
        return self._new(value, size) if home is None else home.part()

    def _new(self, value: ir.Value, size: int, layout: Plane | None = None) -> Part:
        return Buffer(str(value.name), size, layout=layout).part()

    def _plane_bytes(self, value: ir.Value) -> int:
        return self._count(value) * self.layout(value).bytes

    def _count(self, value: ir.Value) -> int:
        frames, channels, _, _ = static_shape(value)
        return frames * channels


def _layouts(units: Iterable[Unit]) -> dict[tuple[int, int], Plane]:
    """Return the layout by image size; the pad is the largest that any window needs."""
    pads: dict[tuple[int, int], int] = {}

    def need(value: ir.Value, pad: int) -> None:
        _, _, height, width = static_shape(value)
        pads[height, width] = max(pads.get((height, width), 1), pad)

    for unit in units:
        if isinstance(unit, ConvUnit):
            need(unit.x, max(unit.pads))
        elif unit.kind == "max_pool":
            need(unit.inputs[0], max(unit.nodes[0].attributes["pads"].as_ints(), default=0))
    return {size: Plane(size, pad) for size, pad in pads.items()}


def _overwritten_in_place(read: ir.Value, write: ir.Value) -> bool:
    """Tell whether a state's next value is its last one with parts computed anew."""
    value: ir.Value | None = write
    while value is not None and value is not read:
        node = value.producer()
        if node is None or node.domain != DV or node.op_type != "SparseConv":
            return False
        operator = operator_of(node)
        assert operator is not None
        value = operator.bind(node)["base"]
    return value is read


def _bytes(value: ir.Value) -> int:
    assert value.dtype is not None
    return int(max(1, int(np.prod(static_shape(value), dtype=np.int64))) * value.dtype.itemsize)


def _port(value: ir.Value, place: Place | None) -> Port:
    assert place is not None and value.name is not None and value.dtype is not None
    return Port(value.name, str(value.dtype.numpy()), static_shape(value), place)
