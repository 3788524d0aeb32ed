"""The list of calls that is being written: kernels with their arguments, before memory is placed.

The words are those of the plan (`targets/tvm/plan.py`): a *call* is one entry of the list, an *alternative* a kernel
that can do it. Here arguments are parts of buffers, there they are places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dvexport.targets.tvm.calls.memory import FLOAT_BYTES, Buffer, Constants, Part
from dvexport.targets.tvm.kernels.abi import Kernel
from dvexport.targets.tvm.kernels.planes import elementwise
from dvexport.targets.tvm.machine.machine import Machine
from dvexport.targets.tvm.plan import COST_TERMS
from dvexport.targets.tvm.units.catalogue import KINDS

__all__ = ["NO_COUNTS", "Alternative", "Call", "CallList", "Counts"]

NO_COST = (0.0,) * COST_TERMS

Counts = tuple[Part | None, Part | None, Part | None]
"""Lists of output channels, input channels and vectors that a call's work is proportional to."""

NO_COUNTS: Counts = (None, None, None)


@dataclass(frozen=True)
class Alternative:
    """A kernel with its arguments, its cost model and what it is for; see `plan.Alternative`."""

    kernel: Kernel
    arguments: tuple[Part, ...]
    cost: tuple[float, ...] = NO_COST
    only: int = 0


@dataclass(frozen=True)
class Call:
    """One entry of the list; see `plan.Call`."""

    alternatives: tuple[Alternative, ...]
    label: str
    gate: str
    counts: Counts = NO_COUNTS

    @property
    def buffers(self) -> list[Buffer]:
        """Every buffer that it names."""
        return [part.buffer for alternative in self.alternatives for part in alternative.arguments]


@dataclass
class CallList:
    """Calls in the order of execution.

    Attributes:
        machine: what kernels are generated for.
        constants: the weights file, shared by the variants of a model.
        calls: those written so far.
        kernels: every kernel called, by name.
    """

    machine: Machine
    constants: Constants
    calls: list[Call] = field(default_factory=list)
    kernels: dict[str, Kernel] = field(default_factory=dict)

    def call(self, kernel: Kernel, arguments: Sequence[Part], label: str, gate: str = "") -> None:
        """Write a call without a choice."""
        self.choose([Alternative(kernel, tuple(arguments))], label, gate)

    def choose(
        self, alternatives: Sequence[Alternative], label: str, gate: str = "", counts: Counts = NO_COUNTS
    ) -> None:
        """Write a call with several kernels that can do it.

        Args:
            alternatives: one or more; the runtime takes the cheapest.
            label: what a profile calls it: a kind of `units/catalogue.py`, and the value it is for.
            gate: the gate it belongs to, or nothing.
            counts: what its cost depends on.
        """
        assert label.partition(" ")[0] in KINDS, label
        for each in alternatives:
            assert len(each.arguments) == len(each.kernel.buffers), (each.kernel.name, each.kernel.buffers)
            self.kernels[each.kernel.name] = each.kernel
        self.calls.append(Call(tuple(alternatives), label, gate, counts))

    def copy(self, source: Part, target: Part, label: str, gate: str = "") -> None:
        """Copy bytes, rounded up to whole floats: buffers end on 64 bytes."""
        floats = -(-min(source.size, target.size) // FLOAT_BYTES)
        shape = self.constants.add(elementwise.copy_shape(floats))
        whole = [Part(each.buffer, each.offset, floats * FLOAT_BYTES) for each in (source, target)]
        self.call(elementwise.copy(self.machine), [whole[0], shape, whole[1]], f"copy {label}", gate)

    def clear(self, target: Part, label: str, gate: str = "") -> None:
        """Zero whole planes."""
        shape = self.constants.add(elementwise.elementwise_shape(target.size // FLOAT_BYTES))
        self.call(elementwise.clear(self.machine), [shape, target], f"clear {label}", gate)
