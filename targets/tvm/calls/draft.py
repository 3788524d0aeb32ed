"""A draft: the plan of a step while units are written into it.

It joins what lies where (`values.py`) with the list of calls (`call_list.py`): a value that is wanted in the form that
it does not have yet is converted, once, by a call. `place.py` makes a plan of a draft.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from dvexport.graph.graph import array_of
from dvexport.targets.tvm.calls.call_list import CallList
from dvexport.targets.tvm.calls.memory import Buffer, Constants, Part
from dvexport.targets.tvm.calls.values import Forms, Values, flat_bytes
from dvexport.targets.tvm.kernels.planes import planes
from dvexport.targets.tvm.machine.machine import Machine
from dvexport.targets.tvm.plan import Space
from dvexport.targets.tvm.units.unit import Unit

__all__ = ["ALGORITHMS", "Draft"]

ALGORITHMS = ("direct", "winograd")
"""Algorithms of convolutions."""


class Draft:
    """What is known of a step while it is written.

    Args:
        model: frames fixed.
        units: its units, in the order in which they will be written.
        machine: what kernels are generated for.
        constants: the weights file, shared by the variants of a model.
        algorithms: the algorithms of convolutions to choose from at run time; `direct` is always there.
        threads: the most that may share a step: scratch memory is laid out for as many.

    Attributes:
        values: what lies where.
        calls: the calls so far.
        lists: lists made of decisions so far, by what they are (`decisions.py`).
    """

    def __init__(
        self,
        model: ir.Model,
        units: Sequence[Unit],
        machine: Machine,
        constants: Constants,
        algorithms: Collection[str] = ALGORITHMS,
        threads: int = 1,
    ) -> None:
        self.units, self.machine, self.constants = units, machine, constants
        self.algorithms, self.threads = algorithms, threads
        self.values = Values(model, units)
        self.calls = CallList(machine, constants)
        self.lists: dict[tuple[object, ...], Part] = {}

    # Values to read

    def planes(self, value: ir.Value) -> Part:
        """Return an image's planes, `[N * C]` of them."""
        constant = array_of(value)
        if constant is not None:
            return self.constants.add(self.values.layout(value).pack(constant), str(value.name))
        forms = self.values.of(value)
        if forms.planes is None:
            assert forms.flat is not None, value
            layout = self.values.layout(value)
            forms.planes = Buffer(str(value.name), self.values.plane_bytes(value), layout=layout).part()
            shape = self.constants.add(planes.frame_shape(self.values.plane_count(value), layout))
            kernel, gate = planes.load_frame(self.machine), self.values.gate_of(value)
            self.calls.call(kernel, [forms.flat, shape, forms.planes], f"load {value.name}", gate)
        return forms.planes

    def flat(self, value: ir.Value) -> Part:
        """Return a value as ONNX lays it out."""
        constant = array_of(value)
        if constant is not None:
            return self.constants.add(constant, str(value.name))
        forms = self.values.of(value)
        if forms.flat is None:
            assert forms.planes is not None, value
            forms.flat = Buffer(str(value.name), flat_bytes(value)).part()
            shape = self.constants.add(planes.frame_shape(self.values.plane_count(value), self.values.layout(value)))
            kernel, gate = planes.store_planes(self.machine), self.values.gate_of(value)
            self.calls.call(kernel, [forms.planes, shape, forms.flat], f"store {value.name}", gate)
        return forms.flat

    # Values to write

    def new_planes(
        self, value: ir.Value, *, fragile: bool = False, covered: bool = False, partial: bool = False
    ) -> Part:
        """Return memory for an image that is about to be written.

        Args:
            value: the image.
            fragile: what writes it needs its padding to be zero already.
            covered: if it is fragile, what writes it writes the padding between rows too.
            partial: what writes it leaves some of its padding as it is, and nobody reads that.
        """
        part = self.values.new(value, self.values.plane_bytes(value))
        if self.values.home(value) is None and not partial:
            part.buffer.layout, part.buffer.fragile, part.buffer.covered = self.values.layout(value), fragile, covered
        self.values.set(value, Forms(planes=part))
        return part

    def new_flat(self, value: ir.Value) -> Part:
        """Return memory for a value that is about to be written."""
        part = self.values.new(value, flat_bytes(value))
        self.values.set(value, Forms(flat=part))
        return part

    # Values that are others

    def share(self, value: ir.Value, part: Part, *, flat: bool = False) -> None:
        """Say that a value is what lies at `part`; it is copied if the value has a place of its own."""
        self.values.note_shared(part)
        part = self._at_home(value, part)
        self.values.set(value, Forms(flat=part) if flat else Forms(planes=part))

    def share_forms(self, value: ir.Value, source: ir.Value) -> None:
        """Say that a value is another one; a state takes the form that its place is for."""
        flat = self.values.wants_flat(value, source)
        self.share(value, self.flat(source) if flat else self.planes(source), flat=flat)

    def take_over(self, value: ir.Value, source: ir.Value) -> None:
        """Let a value have the memory of one that ends with it (`Values.may_overwrite`)."""
        part = self.values.of(source).planes
        assert part is not None
        self.values.set(value, Forms(planes=self._at_home(value, part)))

    def _at_home(self, value: ir.Value, part: Part) -> Part:
        """Return where a value lies that has been made at `part`: its home, copied there, if it has one elsewhere."""
        home = self.values.home(value)
        if home is None or home is part.buffer:
            return part
        self.calls.copy(part, home.part(), str(value.name))
        return home.part()

    # The end

    def finish(self) -> dict[ir.Value, Part]:
        """Bring states home and return where the host finds the outputs, all of them in the arena."""
        for state in self.values.states:  # one may have been made elsewhere, such as one that another output shares
            value = self.values.written_by(state)
            home, part = self.values.home(value), self.values.held(value)
            assert part is not None and home is not None, state
            if part.buffer is not home:
                self.calls.copy(part, home.part(), state.name)
        ports = {value: self.flat(value) for value in self.values.outputs}
        for value, part in list(ports.items()):
            if part.buffer.space is not Space.ARENA:
                ports[value] = Buffer(str(value.name), part.size).part()
                self.calls.copy(part, ports[value], str(value.name))
        return ports
