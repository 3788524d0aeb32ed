"""What lies where while a step is written: the forms of every value, the homes of states, and who shares memory.

Images are held as planes (`kernels/plane.py`), everything else flat. States are placed first. A state
that is only overwritten in parts (the computed output that a gate keeps) stays where it is. A state that is rewritten
whole has two halves, which change places after every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dvexport.dialect.spec import specification
from dvexport.graph.graph import DV, static_shape
from dvexport.graph.match import made_by
from dvexport.graph.state import State, states_of
from dvexport.targets.tvm.calls.memory import Buffer, Part
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.plan import Space
from dvexport.targets.tvm.units.catalogue import KINDS
from dvexport.targets.tvm.units.convolutions import ConvUnit
from dvexport.targets.tvm.units.planes import held_as_planes
from dvexport.targets.tvm.units.unit import Unit

__all__ = ["Forms", "Values", "flat_bytes"]


@dataclass
class Forms:
    """Where a value lies as planes, and where flat; one of the two, or both once it has been converted."""

    planes: Part | None = None
    flat: Part | None = None


class Values:
    """Where the values of a model lie.

    Args:
        model: frames fixed.
        units: the model's units, in the order in which they will be written.

    Attributes:
        inputs: the model's inputs, states left out.
        states: what is kept from one step to the next.
    """

    def __init__(self, model: ir.Model, units: Sequence[Unit]) -> None:
        self._units = units
        self._outputs = list(model.graph.outputs)
        self._layouts = _layouts(units)
        self._planar = held_as_planes(units, KINDS)
        self._last = {value: unit for unit in units for value in unit.inputs}
        self._forms: dict[ir.Value, Forms] = {}
        self._homes: dict[ir.Value, Buffer] = {}
        self._shared: set[Buffer] = set()
        self.states = states_of(model)
        read = {value.name: value for value in model.graph.inputs}
        self._written = {value.name: value for value in self._outputs}
        for state in self.states:
            self._place_state(state, read[state.input], self.written_by(state))
        fed = {state.input for state in self.states}
        self.inputs = [value for value in model.graph.inputs if value.name not in fed]
        for value in self.inputs:
            self._forms[value] = Forms(flat=Buffer(str(value.name), flat_bytes(value)).part())

    # Sizes

    def layout(self, value: ir.Value) -> Plane:
        """Return how an image's planes are laid out: all images of a size alike."""
        _, _, height, width = static_shape(value)
        return self._layouts.setdefault((height, width), Plane((height, width)))

    def plane_count(self, value: ir.Value) -> int:
        """Return how many planes an image has: frames times channels."""
        frames, channels, _, _ = static_shape(value)
        return frames * channels

    def plane_bytes(self, value: ir.Value) -> int:
        """Return the bytes of an image's planes."""
        return self.plane_count(value) * self.layout(value).bytes

    # Where they lie

    def of(self, value: ir.Value) -> Forms:
        """Return the forms of a value that has been written."""
        try:
            return self._forms[value]
        except KeyError:
            raise AssertionError(f"{value.name} is read before it is written") from None

    def set(self, value: ir.Value, forms: Forms) -> None:
        """Say where a value lies."""
        self._forms[value] = forms

    def home(self, value: ir.Value) -> Buffer | None:
        """Return the place of its own that a state's next value has; None for any other value."""
        return self._homes.get(value)

    def held(self, value: ir.Value) -> Part | None:
        """Return where a value lies in the form that its unit makes."""
        forms = self.of(value)
        return forms.planes if value in self._planar else forms.flat

    def wants_flat(self, value: ir.Value, source: ir.Value) -> bool:
        """Tell whether a value that is another one is flat: a state as its place is, others as what they are."""
        return value not in self._planar if value in self._homes else self.of(source).planes is None

    def new(self, value: ir.Value, size: int, layout: Plane | None = None) -> Part:
        """Return memory for a value: its home, or a buffer of `size` bytes."""
        home = self._homes.get(value)
        return (home or Buffer(str(value.name), size, layout=layout)).part()

    # Who shares memory

    def note_shared(self, part: Part) -> None:
        """Note that several values lie in a buffer."""
        self._shared.add(part.buffer)

    def may_overwrite(self, value: ir.Value, unit: Unit) -> bool:
        """Tell whether a unit may write over a value it reads: nobody reads it later, under this or another name."""
        part = self.of(value).planes
        last = self._last[value] is unit and not value.is_graph_output()
        return last and part is not None and part.buffer not in self._shared

    def reads_padding(self, value: ir.Value) -> bool:
        """Tell whether anybody needs an image's padding to be zero."""
        readers = [unit for unit in self._units if value in unit.inputs]
        return value.is_graph_output() or not all(
            isinstance(unit, ConvUnit) and not unit.reads_padding_of(value) for unit in readers
        )

    def gate_of(self, value: ir.Value) -> str:
        """Return the gate of the unit that makes a value, or nothing."""
        return next((unit.gate for unit in self._units if value in unit.outputs), "")

    # Ports and states

    @property
    def outputs(self) -> list[ir.Value]:
        """The outputs of the model, states left out."""
        written = {state.output for state in self.states}
        return [value for value in self._outputs if value.name not in written]

    def written_by(self, state: State) -> ir.Value:
        """Return a state's next value."""
        return self._written[state.output]

    def _place_state(self, state: State, read: ir.Value, write: ir.Value) -> None:
        planar = write in self._planar
        size = self.plane_bytes(write) if planar else flat_bytes(write)
        if _overwritten_in_place(read, write):
            before = after = Buffer(state.name, size, Space.STATE)
        else:
            before = Buffer(state.name, size, Space.BEFORE)
            after = Buffer(state.name, size, Space.AFTER, before)
        self._homes[write] = after
        self._forms[read] = Forms(planes=before.part()) if planar else Forms(flat=before.part())


def flat_bytes(value: ir.Value) -> int:
    """Return the bytes of a value as ONNX lays it out."""
    assert value.dtype is not None
    return int(max(1, int(np.prod(static_shape(value), dtype=np.int64))) * value.dtype.itemsize)


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
            need(unit.inputs[0], max(unit.nodes[0].attributes.get_ints("pads", ()), default=0))
    return {size: Plane(size, pad) for size, pad in pads.items()}


def _overwritten_in_place(read: ir.Value, write: ir.Value) -> bool:
    """Tell whether a state's next value is its last one with parts computed anew."""
    value: ir.Value | None = write
    while value is not read:
        node = made_by(value, "SparseConv", domain=DV)
        if node is None:
            return False
        value = specification(node).bind(node)["base"]
    return True
