"""Let a step write what is new of a large state over the state, instead of copying what is old.

A gate that computes tiles keeps V for later frames, and its next value is a scatter into it. A runtime that gives the
scatter's output the memory of its input writes the tiles alone, if nobody reads the old value afterwards. A graph says
nothing of the order of two nodes that don't depend on each other, so the scatter is made to depend on the reader:

    old = Gather(V, pixels)        V' = ScatterND(V, Reshape(pixels, (rows of old, 1)), values)

With two buffers, as a host may have that knows nothing of this, the graph means the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import onnx_ir as ir
import onnx_ir.passes.common as common

from dvexport.graph.graph import Builder, array_of, replace_node
from dvexport.graph.match import is_op, made_by
from dvexport.graph.state import State, mark_in_place, states_of

__all__ = ["UpdateInPlace"]

_LARGE = 1 << 16
"""Values of a state from which copying them takes longer than the operators that make it unnecessary."""


class UpdateInPlace(ir.passes.InPlacePass):
    """Mark every large state whose next value is a scatter into it and that is read at most once beside.

    Requires: everything lowered. Ensures: every reader of a marked state comes before its writer.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Match state by state."""
        found = [match for state in states_of(model) if (match := _match(model, state)) is not None]
        for match in found:
            if match.reader is not None:
                _write_after(match)
        if found:
            common.TopologicalSortPass()(model)
        mark_in_place(model, [match.state.name for match in found])
        return ir.passes.PassResult(model, bool(found))


@dataclass(frozen=True)
class _Match:
    """A state, the scatter into it at `pixels`, and the gather at the same ones that is to come first."""

    state: State
    scatter: ir.Node
    pixels: ir.Value
    reader: ir.Node | None


def _match(model: ir.Model, state: State) -> _Match | None:
    if prod(state.shape) < _LARGE:
        return None
    read = next(value for value in model.graph.inputs if value.name == state.input)
    write = next(value for value in model.graph.outputs if value.name == state.output)
    scatter = made_by(write, "ScatterND")
    index = made_by(scatter.inputs[1], "Unsqueeze") if scatter is not None else None
    if scatter is None or index is None or index.inputs[0] is None or scatter.inputs[0] is not read:
        return None
    if scatter.attributes:  # one that adds, or takes the largest
        return None
    others = [node for node, _ in read.uses() if node is not scatter]
    if len(others) > 1 or any(node.graph is not model.graph for node in (scatter, *others)):
        return None
    reader = others[0] if others else None
    if reader is not None and not _reads_at(reader, read, index.inputs[0]):
        return None
    return _Match(state, scatter, index.inputs[0], reader)


def _reads_at(node: ir.Node, value: ir.Value, pixels: ir.Value) -> bool:
    """Tell whether a node gathers rows of `value` at `pixels`, made a vector."""
    rows = is_op(node, "Gather") and node.attributes.get_int("axis", 0) == 0
    return rows and node.inputs[0] is value and node.inputs[1] is _flat(pixels, (-1,))


def _flat(value: ir.Value, shape: Iterable[int]) -> ir.Value | None:
    """Return what reshapes a value to a constant shape, if the graph has it."""
    for node, position in value.uses():
        if is_op(node, "Reshape") and position == 0:
            asked = array_of(node.inputs[1])
            if asked is not None and tuple(asked) == tuple(shape):
                return node.outputs[0]
    return None


def _write_after(match: _Match) -> None:
    """Give the scatter an index that can't be known before the reader has read."""
    assert match.reader is not None
    scatter, build = match.scatter, Builder(metadata=match.scatter.metadata_props)
    base, _, values = scatter.inputs
    assert base is not None and values is not None
    channels = match.state.shape[-1]
    rows = build.op("Shape", match.reader.outputs[0], start=0, end=1)
    index = build.op("Reshape", match.reader.inputs[1], build.op("Concat", rows, build.ints(1), axis=0))
    flat = _flat(values, (-1, channels)) or build.op("Reshape", values, build.ints(-1, channels))
    output = scatter.outputs[0]
    written = build.op("ScatterND", base, index, flat, shape=match.state.shape, dtype=output.dtype)
    replace_node(scatter, build, [written])
