"""Calls of single operators over images: pooling, means, sums, joins and parts."""

from __future__ import annotations

from dvexport.graph.graph import array_of, static_shape
from dvexport.targets.tvm.calls.draft import Draft
from dvexport.targets.tvm.calls.memory import FLOAT_BYTES, scratch
from dvexport.targets.tvm.calls.writers import Writers, label_of
from dvexport.targets.tvm.kernels.abi import Kernel
from dvexport.targets.tvm.kernels.planes import elementwise, pooling
from dvexport.targets.tvm.units.unit import Unit

__all__ = ["WRITERS"]

WRITERS = Writers()


@WRITERS.writes("max_pool", Unit)
def _max_pool(draft: Draft, unit: Unit) -> None:
    node, x, y = unit.nodes[0], unit.inputs[0], unit.output
    kernel, strides = (node.attributes[name].as_ints() for name in ("kernel_shape", "strides"))
    pads = node.attributes.get_ints("pads", [0] * 4)
    frames, channels, _, _ = static_shape(x)
    shape = pooling.pool_shape(
        frames * channels, draft.values.layout(x), draft.values.layout(y), (strides[0], strides[1]), (pads[0], pads[1])
    )
    made = pooling.max_pool((kernel[0], kernel[1]), strides[1], draft.machine)
    draft.calls.call(
        made, [draft.planes(x), draft.constants.add(shape), draft.new_planes(y)], label_of(unit), unit.gate
    )


@WRITERS.writes("avg_pool", Unit)
def _avg_pool(draft: Draft, unit: Unit) -> None:
    """Mean of every cell of a grid. The result is small, and mostly read by policies: it is held flat."""
    x, kernel = unit.inputs[0], unit.nodes[0].attributes["kernel_shape"].as_ints()
    frames, channels, _, _ = static_shape(x)
    cell = kernel[0], kernel[1]
    arguments = [
        draft.planes(x),
        scratch(pooling.cell_mean_scratch(draft.values.layout(x), cell, draft.threads)),
        draft.constants.add(pooling.cell_mean_shape(frames * channels, draft.values.layout(x), cell)),
        draft.new_flat(unit.output),
    ]
    draft.calls.call(pooling.cell_mean(draft.machine), arguments, label_of(unit), unit.gate)


@WRITERS.writes("mean", Unit)
def _mean(draft: Draft, unit: Unit) -> None:
    x, y = unit.inputs[0], unit.output
    frames, channels, _, _ = static_shape(x)
    shape = pooling.global_mean_shape(frames * channels, draft.values.layout(x))
    made = pooling.global_mean(draft.machine)
    draft.calls.call(made, [draft.planes(x), draft.constants.add(shape), draft.new_flat(y)], label_of(unit), unit.gate)


@WRITERS.writes("relu", Unit)
def _relu(draft: Draft, unit: Unit) -> None:
    _elementwise(draft, unit, elementwise.relu(draft.machine))


@WRITERS.writes("add", Unit)
def _add(draft: Draft, unit: Unit) -> None:
    _elementwise(draft, unit, elementwise.add(draft.machine))


def _elementwise(draft: Draft, unit: Unit, kernel: Kernel) -> None:
    sources = [draft.planes(value) for value in unit.nodes[0].inputs if value is not None]
    shape = draft.constants.add(elementwise.elementwise_shape(sources[0].size // FLOAT_BYTES))
    draft.calls.call(kernel, [*sources, shape, draft.new_planes(unit.output)], label_of(unit), unit.gate)


@WRITERS.writes("concat", Unit)
def _concat(draft: Draft, unit: Unit) -> None:
    node = unit.nodes[0]
    target = draft.new_planes(unit.output)
    frames = 1 if node.attributes["axis"].as_int() == 0 else static_shape(unit.output)[0]
    parts = [draft.planes(value) for value in node.inputs if value is not None]
    for index in range(frames):
        whole, offset = target.frame(frames, index), 0
        for part in parts:
            piece = part.frame(frames, index)
            draft.calls.copy(piece, whole.part(offset, piece.size), label_of(unit))
            offset += piece.size


@WRITERS.writes("slice", Unit)
def _slice(draft: Draft, unit: Unit) -> None:
    node = unit.nodes[0]
    x, y = node.inputs[0], unit.output
    starts, axes = array_of(node.inputs[1]), array_of(node.inputs[3])
    assert x is not None and starts is not None and axes is not None
    axis, shape = int(axes[0]), static_shape(x)
    first = min(int(starts[0]) % (shape[axis] + 1), shape[axis])
    source, wanted = draft.planes(x), static_shape(y)
    plane = draft.values.layout(x).bytes
    if axis == 0 or shape[0] == 1:  # contiguous: nothing to move
        skipped = first * (shape[1] if axis == 0 else 1)
        draft.share(y, source.part(skipped * plane, wanted[0] * wanted[1] * plane))
        return
    target = draft.new_planes(y)
    for index in range(shape[0]):
        piece = source.frame(shape[0], index).part(first * plane, wanted[1] * plane)
        draft.calls.copy(piece, target.frame(shape[0], index), label_of(unit))


@WRITERS.writes("copy", Unit)
def _copy(draft: Draft, unit: Unit) -> None:
    value = unit.nodes[0].inputs[0]
    assert value is not None
    draft.share_forms(unit.output, value)
