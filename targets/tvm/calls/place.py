"""From a draft to a plan: all memory is placed, and padding cleared where others may have written it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from dvexport.graph.graph import static_shape
from dvexport.targets.tvm import plan
from dvexport.targets.tvm.calls.call_list import Alternative, Call, CallList
from dvexport.targets.tvm.calls.draft import Draft
from dvexport.targets.tvm.calls.memory import (
    Buffer,
    Constants,
    Part,
    Placement,
    lower_bound,
    place_buffers,
)
from dvexport.targets.tvm.kernels.planes import planes

__all__ = ["HostPort", "Placed", "place", "place_calls"]


@dataclass(frozen=True)
class Placed:
    """A plan, and the bytes of the arena that no placement of its buffers could do without."""

    plan: plan.Plan
    arena_bound: int


@dataclass(frozen=True)
class HostPort:
    """An input or output before memory is placed; see `plan.Port`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    part: Part


def place(draft: Draft) -> Placed:
    """Finish a draft and place all its memory."""
    written = draft.finish()
    inputs = [_port(value, draft.values.of(value).flat) for value in draft.values.inputs]
    outputs = [_port(value, part) for value, part in written.items()]
    return place_calls(draft.calls, inputs, outputs, draft.threads)


def place_calls(
    calls: CallList,
    inputs: Sequence[HostPort],
    outputs: Sequence[HostPort],
    threads: int = 1,
    kept: Iterable[Buffer] = (),
) -> Placed:
    """Place the memory of calls.

    Args:
        calls: all of a step.
        inputs: written by the host before the first call.
        outputs: read by the host after the last one.
        threads: the most that may share a step.
        kept: buffers that share their bytes with no other once they have been named, as outputs do.
    """
    entry = [port.part.buffer for port in inputs]
    uses = [entry, *(call.buffers for call in calls.calls)]
    kept = [*(port.part.buffer for port in outputs), *kept]
    placement = place_buffers(uses, kept)
    _clear_padding(calls, placement.spoilt())
    at = _Places(placement, calls.constants)
    made = plan.Plan(
        inputs=[at.port(port) for port in inputs], outputs=[at.port(port) for port in outputs],
        calls=[at.call(call) for call in calls.calls],
        arena=placement.arena, state=placement.state, flip=placement.flip, threads=threads,
        derived=placement.derived,
        derivations=[at.derivation(buffer) for buffer in placement.offsets if buffer.space is plan.Space.DERIVED],
    )  # fmt: skip
    return Placed(made, lower_bound(uses, kept))


def _port(value: ir.Value, part: Part | None) -> HostPort:
    assert value.name is not None and value.dtype is not None and part is not None, value
    return HostPort(value.name, str(value.dtype.numpy()), static_shape(value), part)


def _clear_padding(calls: CallList, spoilt: Collection[Buffer]) -> None:
    """Before the first call that names a buffer whose padding others write, zero that."""
    waiting, written = set(spoilt), calls.calls
    calls.calls = []
    for call in written:
        for buffer in dict.fromkeys(call.buffers):
            if buffer in waiting:
                waiting.discard(buffer)
                _clear(calls, buffer, call.gate)
        calls.calls.append(call)


def _clear(calls: CallList, buffer: Buffer, gate: str) -> None:
    assert buffer.layout is not None
    channels = buffer.size // buffer.layout.bytes
    kernel, shape = planes.zero_pads(calls.machine), planes.frame_shape(channels, buffer.layout)
    if buffer.covered:
        kernel, shape = planes.zero_ends(calls.machine), planes.ends_shape(channels, buffer.layout)
    calls.call(kernel, [calls.constants.add(shape), buffer.part()], f"pad {buffer.name}", gate)


@dataclass(frozen=True)
class _Places:
    """The places of parts, and what a plan says with them."""

    placement: Placement
    constants: Constants

    def of(self, part: Part) -> plan.Place:
        return self.placement.place(part, self.constants)

    def call(self, call: Call) -> plan.Call:
        rows, columns, vectors = (None if part is None else self.of(part) for part in call.counts)
        return plan.Call(
            tuple(map(self.alternative, call.alternatives)), call.label, call.gate, (rows, columns, vectors)
        )

    def alternative(self, each: Alternative) -> plan.Alternative:
        return plan.Alternative(each.kernel.name, tuple(map(self.of, each.arguments)), each.cost, each.only)

    def derivation(self, buffer: Buffer) -> plan.Derivation:
        recipe = self.constants.recipes[buffer]
        return plan.Derivation(
            self.of(recipe.source), self.of(recipe.matrix), self.of(buffer.part()), recipe.points, recipe.edge,
            recipe.outputs, recipe.inputs, recipe.source_row, recipe.target_row,
        )  # fmt: skip

    def port(self, port: HostPort) -> plan.Port:
        return plan.Port(port.name, port.dtype, port.shape, self.of(port.part))
