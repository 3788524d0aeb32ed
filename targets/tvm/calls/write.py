"""From the units of a graph to kernel calls: one rule for each kind of unit."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir

from dvexport.dialect.spec import operator_of
from dvexport.graph.graph import array_of, static_shape
from dvexport.targets.tvm.calls.convolution import write_conv
from dvexport.targets.tvm.calls.decisions import channel_list, line_list, lines_suffice, not_skipped, pixel_mask
from dvexport.targets.tvm.calls.memory import Buffer, Constants
from dvexport.targets.tvm.calls.program import ALGORITHMS, FLOAT_BYTES, Program
from dvexport.targets.tvm.calls.transformers import TOKEN_RULES
from dvexport.targets.tvm.islands.island import compile_island
from dvexport.targets.tvm.kernels.conv.direct_data import Window
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.kernels.planes import elementwise, planes, pooling
from dvexport.targets.tvm.kernels.tokens import dense
from dvexport.targets.tvm.machine.machine import Machine
from dvexport.targets.tvm.units.cut import ConvUnit, cut
from dvexport.targets.tvm.units.unit import Unit

__all__ = ["write_program"]


def write_program(
    model: ir.Model,
    machine: Machine,
    constants: Constants,
    gates: Collection[str] = (),
    algorithms: Collection[str] = ALGORITHMS,
    threads: int = 1,
) -> Program:
    """Return the calls of a model's step.

    Args:
        model: lowered for kernels: standard operators, `SparseConv` and `Merge`; frames fixed.
        machine: what to generate kernels for.
        constants: the weights file; what several variants of a model share is stored once.
        gates: names of the model's gates, for profiles.
        algorithms, threads: see `Program`.

    Raises:
        UsageError: an operator that no kernel can be made for; names the node and where it came from.
    """
    program = Program(model, cut(model, gates), machine, constants, algorithms, threads)
    for unit in program.units:
        _RULES[unit.kind](program, unit)
    return program


def _conv(program: Program, unit: Unit) -> None:
    assert isinstance(unit, ConvUnit)
    write_conv(program, unit)


def _gemm(program: Program, unit: Unit) -> None:
    node, machine = unit.nodes[0], program.machine
    weight, bias = array_of(node.inputs[1]), array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    assert weight is not None and node.inputs[0] is not None
    outputs, inputs = weight.shape
    rows, producer = static_shape(node.inputs[0])[0], node.inputs[0].producer()
    skips = rows == 1 and producer is not None and producer.op_type == "Relu"
    spec = dense.dense_spec(outputs, machine, relu=len(unit.nodes) > 1, skips=skips)
    given = np.zeros(outputs, np.float32) if bias is None else bias
    arguments = [
        program.flat(node.inputs[0]),
        program.constants.add(dense.dense_weights(weight, spec, machine), of=weight.T),
        program.constants.add(dense.dense_bias(given, spec, machine), of=given),
        *([program.scratch(dense.dense_scratch(inputs, program.threads))] if skips else []),
        program.constants.add(dense.dense_shape(rows, outputs, inputs)),
        program.new_flat(unit.output),
    ]
    program.call(dense.dense(spec, machine), arguments, _label(unit), unit.gate)


def _max_pool(program: Program, unit: Unit) -> None:
    node, x, y = unit.nodes[0], unit.inputs[0], unit.output
    kernel, strides = _ints(node, "kernel_shape"), _ints(node, "strides")
    pads = _ints(node, "pads") if "pads" in node.attributes else [0, 0, 0, 0]
    frames, channels, _, _ = static_shape(x)
    shape = pooling.pool_shape(
        frames * channels, program.layout(x), program.layout(y), (strides[0], strides[1]), (pads[0], pads[1])
    )
    made = pooling.max_pool((kernel[0], kernel[1]), strides[1], program.machine)
    program.call(
        made, [program.planes(x), program.constants.add(shape), program.new_planes(y)], _label(unit), unit.gate
    )


def _avg_pool(program: Program, unit: Unit) -> None:
    """Mean of every cell of a grid. The result is small, and mostly read by policies: it is held flat."""
    x, kernel = unit.inputs[0], _ints(unit.nodes[0], "kernel_shape")
    frames, channels, _, _ = static_shape(x)
    cell = kernel[0], kernel[1]
    arguments = [
        program.planes(x),
        program.scratch(pooling.cell_mean_scratch(program.layout(x), cell, program.threads)),
        program.constants.add(pooling.cell_mean_shape(frames * channels, program.layout(x), cell)),
        program.new_flat(unit.output),
    ]
    program.call(pooling.cell_mean(program.machine), arguments, _label(unit), unit.gate)


def _mean(program: Program, unit: Unit) -> None:
    x, y = unit.inputs[0], unit.output
    frames, channels, _, _ = static_shape(x)
    shape = pooling.global_mean_shape(frames * channels, program.layout(x))
    made = pooling.global_mean(program.machine)
    program.call(made, [program.planes(x), program.constants.add(shape), program.new_flat(y)], _label(unit), unit.gate)


def _merge(program: Program, unit: Unit) -> None:
    node = unit.nodes[0]
    operator = operator_of(node)
    assert operator is not None
    inputs = operator.bind(node)
    v, history, action, tiles = inputs["V"], inputs["H"], inputs["action"], inputs["tiles"]
    assert v is not None
    if tiles is None and history is v and _reads_listed(unit.output):
        program.share(unit.output, program.planes(v))  # whoever reads it leaves out what was skipped
        return
    frames, channels, _, _ = static_shape(v)
    plane, machine = program.layout(v), program.machine
    source, target = program.planes(v), program.new_planes(unit.output, partial=True)
    if not _reads_listed(unit.output):
        program.clear(target, str(unit.output.name), unit.gate)
    shape = program.constants.add(planes.merge_shape(plane))
    for index in range(frames):
        rows = channel_list(program, None, channels, index) if action is None else not_skipped(program, action, index)
        mask = program.constants.add(plane.inside()) if tiles is None else pixel_mask(program, tiles, index, plane)
        one, to = program.frame(source, frames, index), program.frame(target, frames, index)
        if history is not None and history is not v:
            assert action is not None
            old = program.frame(program.planes(history), frames, index)
            chosen = program.frame(program.flat(action), frames, index)
            kernel, arguments = planes.merge_history(machine), [one, old, mask, chosen, rows, shape, to]
        elif tiles is not None and _reads_tiles(unit.output, tiles, plane):
            kernel = planes.merge_lines(machine)
            arguments = [one, mask, rows, line_list(program, tiles, index, plane), shape, to]
        else:
            kernel, arguments = planes.merge(machine), [one, mask, rows, shape, to]
        program.call(kernel, arguments, _label(unit), unit.gate)


def _reads_listed(value: ir.Value) -> bool:
    """Tell whether all who read a merge leave out the channels that were skipped."""
    return all(_conv_input(user, "active_in") is not None for user, _ in value.uses()) and not value.is_graph_output()


def _reads_tiles(value: ir.Value, tiles: ir.Value, plane: Plane) -> bool:
    """Tell whether all who read a merge are convolutions that need only the lines around its active tiles."""
    return not value.is_graph_output() and all(
        _conv_input(user, "tiles") is tiles
        and lines_suffice(tiles, plane, _window(user), static_shape(user.outputs[0])[2:])  # type: ignore[arg-type]
        for user, _ in value.uses()
    )


def _window(node: ir.Node) -> Window:
    """Return the window of a convolution of the dialect."""
    operator = operator_of(node)
    assert operator is not None
    given, weight = operator.attributes_of(node), operator.bind(node)["W"]
    assert weight is not None
    _, _, height, width = static_shape(weight)
    return Window((height, width), tuple(given["strides"]), tuple(given["pads"][:2]), tuple(given["dilations"]))


def _conv_input(node: ir.Node, name: str) -> ir.Value | None:
    operator = operator_of(node)
    return operator.bind(node)[name] if operator is not None and operator.name == "SparseConv" else None


def _elementwise(program: Program, unit: Unit) -> None:
    inputs = unit.nodes[0].inputs
    make = elementwise.relu if unit.kind == "relu" else elementwise.add
    kernel = make(program.machine)
    sources = [program.planes(value) for value in inputs if value is not None]
    shape = program.constants.add(elementwise.elementwise_shape(sources[0].size // FLOAT_BYTES))
    program.call(kernel, [*sources, shape, program.new_planes(unit.output)], _label(unit), unit.gate)


def _concat(program: Program, unit: Unit) -> None:
    node = unit.nodes[0]
    target = program.new_planes(unit.output)
    frames = 1 if node.attributes["axis"].as_int() == 0 else static_shape(unit.output)[0]
    parts = [program.planes(value) for value in node.inputs if value is not None]
    for index in range(frames):
        whole, offset = program.frame(target, frames, index), 0
        for part in parts:
            piece = program.frame(part, frames, index)
            program.copy(piece, whole.part(offset, piece.size), _label(unit))
            offset += piece.size


def _slice(program: Program, unit: Unit) -> None:
    node = unit.nodes[0]
    x, y = node.inputs[0], unit.output
    starts, axes = array_of(node.inputs[1]), array_of(node.inputs[3])
    assert x is not None and starts is not None and axes is not None
    axis, shape = int(axes[0]), static_shape(x)
    first = min(int(starts[0]) % (shape[axis] + 1), shape[axis])
    source, wanted = program.planes(x), static_shape(y)
    plane = program.layout(x).bytes
    if axis == 0 or shape[0] == 1:  # contiguous: nothing to move
        skipped = first * (shape[1] if axis == 0 else 1)
        program.share(y, source.part(skipped * plane, wanted[0] * wanted[1] * plane))
        return
    target = program.new_planes(y)
    for index in range(shape[0]):
        piece = program.frame(source, shape[0], index).part(first * plane, wanted[1] * plane)
        program.copy(piece, program.frame(target, shape[0], index), _label(unit))


def _copy(program: Program, unit: Unit) -> None:
    value = unit.nodes[0].inputs[0]
    assert value is not None
    program.share_forms(unit.output, value)


def _island(program: Program, unit: Unit) -> None:
    island = compile_island(unit.nodes, unit.inputs, unit.outputs, program.machine)
    parts = {str(value.name): program.flat(value) for value in unit.inputs}
    outputs = {str(value.name): value for value in unit.outputs}
    parts |= {name: program.constants.add(array) for name, array in island.constants.items()}
    for name, (dtype, shape) in island.buffers.items():
        parts[name] = Buffer(name, max(1, int(np.prod(shape))) * np.dtype(dtype).itemsize).part()
    for name, value in outputs.items():
        if name not in island.aliases:
            parts[name] = program.new_flat(value)
    for kernel, arguments in island.calls:
        program.call(kernel, [parts[name] for name in arguments], _label(unit), unit.gate)
    for name, source in island.aliases.items():
        program.share(outputs[name], parts[source], flat=True)


_RULES: dict[str, Callable[[Program, Unit], None]] = {
    "conv": _conv,
    "gemm": _gemm,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "mean": _mean,
    "merge": _merge,
    "relu": _elementwise,
    "add": _elementwise,
    "concat": _concat,
    "slice": _slice,
    "copy": _copy,
    "island": _island,
    **TOKEN_RULES,
}


def _label(unit: Unit) -> str:
    """What a profile calls it: the value that it makes, which the graph names after the model's modules."""
    return f"{unit.kind} {unit.outputs[-1].name if unit.outputs else ''}".strip()


def _ints(node: ir.Node, name: str) -> list[int]:
    return list(node.attributes[name].as_ints())
