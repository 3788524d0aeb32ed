"""Attention in windows as a loop over windows, so that its scores stay in the cache.

ONNX Runtime carries an operator out for all windows before it begins the next. The scores of a stage of Video-Swin
have up to 236 MB, which the product, each sum, the softmax and the second product write to memory and read back. A
`Scan` (standard, and lazily sliced: its inputs are not copied) takes a few windows at a time through all of them.
What leads to the scores window by window comes along: cutting tokens into windows, splitting queries, keys and
values, turning heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import onnx_ir as ir

from dvexport.graph.graph import OPSET, Builder, array_of, known_shape, replace_node
from dvexport.graph.match import is_op, only_user

__all__ = ["LoopWindows"]

_CHUNK = 4 << 20
"""Bytes of scores that an iteration makes: about what a core's cache holds. At 196 to 784 tokens a window that is one
window or two, and timings are flat around it."""
_WORTH = 2 * _CHUNK
"""Bytes of scores from which looping pays."""

_FLOAT_BYTES = 4
_AXES = 4
"""Windows, heads, rows, columns."""
_EACH = {"Add", "Sub", "Mul", "Div", "Min", "Max", "MatMul", "Softmax", "Concat", "Pad"}
"""Operators that leave the first of four axes alone, windows."""


class _Axis(NamedTuple):
    """Where the windows of a value are: it has `unit` rows along `axis` for each, and axes of 1 before that."""

    axis: int
    unit: int


@dataclass
class _Region:
    """The operators that become a body.

    Attributes:
        nodes: the operators, and what each reads window by window.
        inside: values that they make.
        read: values that they read window by window.
    """

    nodes: dict[ir.Node, Mapping[ir.Value, _Axis]] = field(default_factory=dict)
    inside: dict[ir.Value, _Axis] = field(default_factory=dict)
    read: dict[ir.Value, _Axis] = field(default_factory=dict)


class LoopWindows(ir.passes.InPlacePass):
    """Put every attention in windows whose scores are large into a loop: the same numbers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite attention by attention."""
        order = {node: place for place, node in enumerate(model.graph)}
        loops = [_loop_around(node, order) for node in order if _is_large(node)]
        return ir.passes.PassResult(model, modified=any(loops))


def _loop_around(softmax: ir.Node, order: Mapping[ir.Node, int]) -> bool:
    """Put the attention of a softmax into a loop, if it is one in windows; tell whether it was."""
    last = _result(softmax)
    if last is None:
        return False
    windows = known_shape(softmax.outputs[0])[0]
    region = _grown(last, windows)
    if softmax not in region.nodes or not _is_clear(region):
        return False
    _loop(region, last, sorted(region.nodes, key=order.__getitem__), windows // _chunk(softmax))
    return True


def _is_large(node: ir.Node) -> bool:
    """Tell whether a node is a softmax over the scores of windows that are worth a loop."""
    if not is_op(node, "Softmax"):
        return False
    shape = known_shape(node.outputs[0])
    return len(shape) == _AXES and shape[0] > 1 and prod(shape) * _FLOAT_BYTES > _WORTH


def _chunk(softmax: ir.Node) -> int:
    """Return the number of windows that an iteration takes, a divisor of all."""
    windows, *rest = known_shape(softmax.outputs[0])
    fitting = (count for count in range(1, windows) if windows % count == 0)
    return max((count for count in fitting if count * prod(rest) * _FLOAT_BYTES <= _CHUNK), default=1)


def _result(softmax: ir.Node) -> ir.Value | None:
    """Return what attention makes: the product with the values, its heads turned behind its tokens if they are."""
    product = only_user(softmax.outputs[0])
    if product is None or not is_op(product, "MatMul"):
        return None
    turned = only_user(product.outputs[0])
    if turned is not None and is_op(turned, "Transpose") and _order(turned)[0] == 0:
        return turned.outputs[0]
    return product.outputs[0]


def _grown(last: ir.Value, windows: int) -> _Region:
    """Go back from a result while everything is done window by window, for nobody else."""
    region = _Region(read={last: _Axis(0, 1)})
    changed = True
    while changed:
        changed = False
        for value in list(region.read):
            node = value.producer()
            if node is None or node.domain or node in region.nodes:
                continue
            made = [output for output in node.outputs if output in region.read]
            kept = [output for output in node.outputs if output is not last]
            alone = all(user in region.nodes for output in kept for user, _ in output.uses())
            if not alone or any(output.is_graph_output() for output in kept) or len(made) != len(node.outputs):
                continue
            axes = {region.read[output] for output in made}
            reads = _reads(node, axes.pop(), windows) if len(axes) == 1 else None
            if reads is None or any(region.read.get(each, axis) != axis for each, axis in reads.items()):
                continue
            region.nodes[node] = reads
            region.inside.update({output: region.read.pop(output) for output in made})
            region.read.update(reads)
            changed = True
    return region


def _is_clear(region: _Region) -> bool:
    """Tell whether nothing that is read window by window is read as a whole as well."""
    own = {*region.inside, *region.read}
    return all(value not in own or value in reads for node, reads in region.nodes.items() for value in node.inputs)


def _reads(node: ir.Node, made: _Axis, windows: int) -> dict[ir.Value, _Axis] | None:
    """Return what a node reads window by window to make a value with windows along `made`; None if it does not."""
    rule = _RULES.get(node.op_type)
    if rule is None or not all(known_shape(value) or value.shape == () for value in node.inputs if value is not None):
        return None
    found = rule(node, made, windows)
    if found is None or any(prod(known_shape(value)[: each.axis]) != 1 for value, each in found.items()):
        return None
    return found


def _each(node: ir.Node, made: _Axis, windows: int) -> dict[ir.Value, _Axis] | None:
    rank = len(known_shape(node.outputs[0]))
    if made != (0, 1) or rank != _AXES:
        return None
    inputs = [value for value in node.inputs if value is not None]
    if is_op(node, "MatMul") and any(array_of(value) is not None for value in inputs):
        return None  # a linear layer is better done for all windows at once
    if is_op(node, "Softmax", "Concat") and node.attributes.get_int("axis", -1) % rank == 0:
        return None
    if is_op(node, "Pad"):
        pads = array_of(inputs[1])
        if pads is None or pads.size != 2 * rank or pads[0] or pads[rank]:
            return None
    return {value: made for value in inputs if len(known_shape(value)) == rank and known_shape(value)[0] == windows}


def _order(node: ir.Node) -> Sequence[int]:
    """Return which axis of its input a transposition puts where."""
    if "perm" in node.attributes:
        return node.attributes["perm"].as_ints()
    return range(len(known_shape(node.outputs[0])))[::-1]


def _transpose(node: ir.Node, made: _Axis, _windows: int) -> dict[ir.Value, _Axis] | None:
    (value,) = node.inputs
    assert value is not None
    return {value: _Axis(_order(node)[made.axis], made.unit)}


def _reshape(node: ir.Node, _made: _Axis, windows: int) -> dict[ir.Value, _Axis] | None:
    value = node.inputs[0]
    assert value is not None
    axis = next((place for place, size in enumerate(known_shape(value)) if size > 1), None)
    if axis is None or known_shape(value)[axis] % windows:
        return None
    return {value: _Axis(axis, known_shape(value)[axis] // windows)}


def _split(node: ir.Node, made: _Axis, _windows: int) -> dict[ir.Value, _Axis] | None:
    value = node.inputs[0]
    assert value is not None
    return None if node.attributes.get_int("axis", 0) % len(known_shape(value)) == made.axis else {value: made}


def _gather(node: ir.Node, made: _Axis, _windows: int) -> dict[ir.Value, _Axis] | None:
    """Rows of something that all windows choose from."""
    data, index = node.inputs
    assert data is not None and index is not None
    chosen = node.attributes.get_int("axis", 0) % len(known_shape(data)) == made.axis and len(known_shape(index)) == 1
    return {index: _Axis(0, made.unit)} if chosen else None


def _resize_rank(node: ir.Node, made: _Axis, _windows: int) -> dict[ir.Value, _Axis] | None:
    """Squeeze and Unsqueeze: windows lie along the first axis that is not 1, before and after."""
    value = node.inputs[0]
    assert value is not None
    axis = next((place for place, size in enumerate(known_shape(value)) if size > 1), None)
    return None if axis is None else {value: _Axis(axis, made.unit)}


_RULES: Mapping[str, Callable[[ir.Node, _Axis, int], dict[ir.Value, _Axis] | None]] = {
    **dict.fromkeys(_EACH, _each),
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Split": _split,
    "Gather": _gather,
    "Squeeze": _resize_rank,
    "Unsqueeze": _resize_rank,
}


def _loop(region: _Region, last: ir.Value, nodes: Sequence[ir.Node], count: int) -> None:
    """Move a region's nodes into the body of a `Scan` of `count` iterations."""
    node = last.producer()
    assert node is not None and node.graph is not None and node in region.nodes
    whole, graph = known_shape(last), node.graph
    build = Builder()
    parts, fed = [], []
    for place, (value, axis) in enumerate(region.read.items()):
        part = ir.Value(name=f"{last.name}.in{place}", shape=ir.Shape(_cut(value, axis, count)), type=value.type)
        fed.append(build.op("Reshape", value, build.ints(count, *_cut(value, axis, count)), dtype=value.dtype))
        for user, index in value.uses():
            if user in region.nodes:
                user.replace_input_with(index, part)
        parts.append(part)
    stand_in = ir.Node("", "Identity", [node.inputs[0]])  # takes the result's place and name in the graph
    graph.insert_after(node, stand_in)
    stand_in.outputs[0].shape, stand_in.outputs[0].type = last.shape, last.type
    ir.convenience.replace_all_uses_with(last, stand_in.outputs[0], replace_graph_outputs=True)
    for value, axis in region.inside.items():
        value.shape = ir.Shape(_cut(value, axis, count))
    for each in nodes:
        if is_op(each, "Reshape"):
            each.replace_input_with(1, build.ints(*known_shape(each.outputs[0])))
    graph.remove(nodes)
    body = ir.Graph(parts, [last], nodes=nodes, opset_imports={"": OPSET}, name=f"{last.name}.windows")
    found = build.op("Scan", *fed, body=body, num_scan_inputs=len(fed), dtype=last.dtype)
    build.nodes[-1].name = f"{last.name}.windows"
    stand_in.replace_input_with(0, found)
    replace_node(stand_in, build, [build.op("Reshape", found, build.ints(*whole))])


def _cut(value: ir.Value, axis: _Axis, count: int) -> tuple[int, ...]:
    """Return the shape of a value's part for one of `count` iterations."""
    shape = list(known_shape(value))
    shape[axis.axis] //= count
    return tuple(shape)
