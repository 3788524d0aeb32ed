"""A model at an older opset: each node means the same there, is written otherwise, or is refused by name.

Models are written in the opset of `dvexport.graph.graph`. Most operators of older opsets differ in types alone. What
differs in form is written by `_WRITTEN`. The file declares the IR version that came with the opset, so that runtimes
of its time read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from dvexport.errors import UsageError
from dvexport.graph.graph import OPSET

__all__ = ["OLDEST", "lower_opset"]

OLDEST = 13
"""The oldest opset: before it, axes of reductions and splits were no inputs, and types fewer."""

_REDEFINED: dict[str, tuple[str, int | bytes] | None] = {
    "AveragePool": ("ceil_mode", 1),
    "LpPool": ("ceil_mode", 1),
    "Resize": ("coordinate_transformation_mode", b"half_pixel_symmetric"),
    "DFT": None,
}
"""Operators that opset 19 or 20 defined anew where older ones have the same signature, and the attribute's value with
which they mean something else (none: they always do)."""


def lower_opset(model: onnx.ModelProto, opset: int) -> None:
    """Write a model at `opset`, from `OLDEST` to `OPSET`, in place.

    Raises:
        UsageError: a node has no meaning there; names it.
    """
    if opset < OPSET:
        read = _read_names(model.graph)
        _lower_graph(model.graph, _Scope(opset, _Names(f"opset{opset}")))
        _drop_constants(model.graph, read - _read_names(model.graph))
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset
    model.ir_version = helper.OP_SET_ID_VERSION_MAP["ai.onnx", opset]


def _read_names(graph: onnx.GraphProto) -> set[str]:
    """Return what nodes read, in branches too, and what the graph puts out."""
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    names = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    return names.union(*map(_read_names, inner))


def _drop_constants(graph: onnx.GraphProto, unread: set[str]) -> None:
    """Remove constants that are attributes now: runtimes warn of what nobody reads."""
    for tensor in [tensor for tensor in graph.initializer if tensor.name in unread]:
        graph.initializer.remove(tensor)


class _Names:
    def __init__(self, prefix: str) -> None:
        self._prefix, self._count = prefix, 0

    def new(self) -> str:
        self._count += 1
        return f"{self._prefix}_{self._count}"


@dataclass
class _Scope:
    """What is known where a node stands.

    Attributes:
        constants: small constants by name, those of enclosing graphs too.
        shapes: static shapes by name.
        added: constants that rewritten nodes read, of this graph.
    """

    opset: int
    names: _Names
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    added: list[onnx.TensorProto] = field(default_factory=list)

    def inside(self) -> _Scope:
        return _Scope(self.opset, self.names, dict(self.constants), dict(self.shapes))

    def constant(self, array: np.ndarray) -> str:
        """Return the name of a new constant."""
        name = self.names.new()
        self.added.append(numpy_helper.from_array(array, name))
        return name

    def read(self, node: onnx.NodeProto, index: int) -> np.ndarray | None:
        """Return a constant input; None where there is no such input.

        Raises:
            UsageError: it is computed.
        """
        if index >= len(node.input) or not node.input[index]:
            return None
        if node.input[index] not in self.constants:
            raise _unfit(node, self.opset, "one of its inputs is computed, and would have to be an attribute")
        return self.constants[node.input[index]]


def _lower_graph(graph: onnx.GraphProto, scope: _Scope) -> None:
    scope.constants |= {t.name: numpy_helper.to_array(t) for t in graph.initializer if not t.external_data}
    for value in (*graph.input, *graph.value_info, *graph.output):
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.HasField("shape") and all(sizes):
            scope.shapes[value.name] = tuple(sizes)
    scope.shapes |= {t.name: tuple(t.dims) for t in graph.initializer}
    written = [new for node in graph.node for new in _lower_node(node, scope)]
    del graph.node[:]
    graph.node.extend(written)
    graph.initializer.extend(scope.added)


def _lower_node(node: onnx.NodeProto, scope: _Scope) -> list[onnx.NodeProto]:
    if node.domain not in ("", "ai.onnx"):
        return [node]
    if node.op_type == "Constant" and node.attribute[0].HasField("t"):
        scope.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    for attribute in node.attribute:
        if attribute.HasField("g"):
            _lower_graph(attribute.g, scope.inside())
    since, write = _WRITTEN.get(node.op_type, (0, None))
    nodes = list(write(node, scope)) if write is not None and scope.opset < since else [node]
    for each in nodes:
        _drop_defaults(each, scope.opset)
        _check(each, scope.opset)
    return nodes


# --- how nodes are written ------------------------------------------------------------------------------------

_Write = Callable[[onnx.NodeProto, _Scope], Iterator[onnx.NodeProto]]


def _reduce(node: onnx.NodeProto, scope: _Scope) -> Iterator[onnx.NodeProto]:
    """Axes were an attribute."""
    axes = scope.read(node, 1)
    del node.input[1:]
    if axes is not None and axes.size:
        node.attribute.append(helper.make_attribute("axes", [int(axis) for axis in axes.ravel()]))
    yield node


def _split(node: onnx.NodeProto, scope: _Scope) -> Iterator[onnx.NodeProto]:
    """Parts were equal unless their sizes were given."""
    parts, axis = _attribute(node, "num_outputs", 0), _attribute(node, "axis", 0)
    _remove(node, "num_outputs")
    if parts and len(node.input) < 2:
        shape = scope.shapes.get(node.input[0])
        if shape is None:
            raise _unfit(node, scope.opset, "the size of what it splits is not known")
        size, largest = shape[axis], -(-shape[axis] // parts)
        sizes = [max(0, min(largest, size - index * largest)) for index in range(parts)]
        node.input.append(scope.constant(np.array(sizes, np.int64)))
    yield node


def _pad(node: onnx.NodeProto, scope: _Scope) -> Iterator[onnx.NodeProto]:
    """Pads were given for every axis."""
    axes, pads = scope.read(node, 3), scope.read(node, 1)
    if axes is not None and pads is not None:
        shape = scope.shapes.get(node.input[0])
        if shape is None:
            raise _unfit(node, scope.opset, "the rank of what it pads is not known")
        every = np.zeros((2, len(shape)), np.int64)
        every[:, axes.ravel()] = pads.reshape(2, -1)
        node.input[1] = scope.constant(every.ravel())
        del node.input[3:]
    yield node


def _reshape(node: onnx.NodeProto, scope: _Scope) -> Iterator[onnx.NodeProto]:
    """A zero meant the size of the input; where there is none, that makes no difference."""
    if _attribute(node, "allowzero", 0):
        shape = scope.read(node, 1)
        if shape is not None and (shape != 0).all():
            _remove(node, "allowzero")
    yield node


def _shape(node: onnx.NodeProto, scope: _Scope) -> Iterator[onnx.NodeProto]:
    """The shape was told as a whole."""
    start, end = _attribute(node, "start", 0), _attribute(node, "end", np.iinfo(np.int64).max)
    whole = scope.names.new()
    yield helper.make_node("Shape", [node.input[0]], [whole], name=node.name)
    limits = [scope.constant(np.array([limit], np.int64)) for limit in (start, end)]
    yield helper.make_node("Slice", [whole, *limits], [node.output[0]])


def _layer_norm(node: onnx.NodeProto, scope: _Scope) -> Iterator[onnx.NodeProto]:
    """Its definition: (x - mean) / sqrt(variance + epsilon) * scale + bias, over the axes from `axis` on."""
    if len(node.output) > 1:
        raise _unfit(node, scope.opset, "its mean is an output")
    shape, axis = scope.shapes.get(node.input[0]), _attribute(node, "axis", -1)
    if shape is None:
        raise _unfit(node, scope.opset, "the rank of what it normalises is not known")
    write, axes = _Writer(scope, node.name), list(range(axis % len(shape), len(shape)))
    centred = write("Sub", node.input[0], write("ReduceMean", node.input[0], axes=axes))
    variance = write("ReduceMean", write("Mul", centred, centred), axes=axes)
    epsilon = scope.constant(np.array(_attribute(node, "epsilon", 1e-5), np.float32))
    result = write("Div", centred, write("Sqrt", write("Add", variance, epsilon)))
    result = write("Mul", result, node.input[1])
    if len(node.input) > 2 and node.input[2]:
        result = write("Add", result, node.input[2])
    yield from write.ending(result, node.output[0])


def _hard_swish(node: onnx.NodeProto, scope: _Scope) -> Iterator[onnx.NodeProto]:
    write, x = _Writer(scope, node.name), node.input[0]
    yield from write.ending(write("Mul", x, write("HardSigmoid", x, alpha=1 / 6, beta=0.5)), node.output[0])


def _mish(node: onnx.NodeProto, scope: _Scope) -> Iterator[onnx.NodeProto]:
    write, x = _Writer(scope, node.name), node.input[0]
    yield from write.ending(write("Mul", x, write("Tanh", write("Softplus", x))), node.output[0])


def _gelu(node: onnx.NodeProto, scope: _Scope) -> Iterator[onnx.NodeProto]:
    """x / 2 * (1 + erf(x / sqrt(2))), or its approximation by tanh."""
    write, x = _Writer(scope, node.name), node.input[0]
    if _attribute(node, "approximate", b"none") == b"tanh":
        cubic = write("Mul", write("Mul", write("Mul", x, x), x), write.number(0.044715))
        curve = write("Tanh", write("Mul", write("Add", x, cubic), write.number(math.sqrt(2 / math.pi))))
    else:
        curve = write("Erf", write("Mul", x, write.number(math.sqrt(0.5))))
    half = write("Mul", x, write.number(0.5))
    yield from write.ending(write("Mul", half, write("Add", curve, write.number(1.0))), node.output[0])


def _grid_sample(node: onnx.NodeProto, _scope: _Scope) -> Iterator[onnx.NodeProto]:
    """Its modes had other names."""
    mode = {b"linear": b"bilinear", b"cubic": b"bicubic"}.get(_attribute(node, "mode", b"linear"))
    if mode is not None:
        _remove(node, "mode")
        node.attribute.append(helper.make_attribute("mode", mode))
    yield node


_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSumSquare",
)  # fmt: skip

_WRITTEN: Mapping[str, tuple[int, _Write]] = {
    **dict.fromkeys(_REDUCTIONS, (18, _reduce)),
    "Split": (18, _split),
    "Pad": (18, _pad),
    "Reshape": (14, _reshape),
    "Shape": (15, _shape),
    "LayerNormalization": (17, _layer_norm),
    "HardSwish": (14, _hard_swish),
    "Mish": (18, _mish),
    "Gelu": (20, _gelu),
    "GridSample": (20, _grid_sample),
}
"""Below which opset a node is written otherwise, and how."""


class _Writer:
    """Writes the nodes that stand for one."""

    def __init__(self, scope: _Scope, name: str) -> None:
        self._scope, self._name = scope, name
        self._nodes: list[onnx.NodeProto] = []

    def __call__(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        output = self._scope.names.new()
        name = f"{self._name}/{op_type}{len(self._nodes)}"
        self._nodes.append(helper.make_node(op_type, inputs, [output], name=name, **attributes))
        return output

    def number(self, value: float) -> str:
        return self._scope.constant(np.array(value, np.float32))

    def ending(self, result: str, output: str) -> list[onnx.NodeProto]:
        """Return the nodes, of which the last gives `result`, under the name `output`."""
        assert list(self._nodes[-1].output) == [result]
        self._nodes[-1].output[0] = output
        return self._nodes


# --- what nodes mean ------------------------------------------------------------------------------------------


def _drop_defaults(node: onnx.NodeProto, opset: int) -> None:
    """Leave out attributes that an older opset does not know and that say what holds there anyway."""
    if not onnx.defs.has(node.op_type, opset):
        return
    known = onnx.defs.get_schema(node.op_type, opset).attributes
    new = onnx.defs.get_schema(node.op_type, OPSET).attributes
    for attribute in list(node.attribute):
        default = new[attribute.name].default_value if attribute.name in new.keys() - known.keys() else None
        if default is None or not default.type:
            continue
        if helper.get_attribute_value(attribute) == helper.get_attribute_value(default):
            node.attribute.remove(attribute)


def _check(node: onnx.NodeProto, opset: int) -> None:
    """Raise UsageError unless a node is legal at `opset` and means the same."""
    written = onnx.defs.get_schema(node.op_type, OPSET).since_version
    try:
        schema = onnx.defs.get_schema(node.op_type, opset)
    except onnx.defs.SchemaError:
        raise _unfit(node, opset, f"opset {opset} does not have it") from None
    if schema.since_version == written:
        return
    unknown = sorted({a.name for a in node.attribute} - set(schema.attributes))
    if unknown:
        raise _unfit(node, opset, f"opset {opset} does not know its attribute {unknown[0]}")
    if len(node.input) > schema.max_input:
        raise _unfit(node, opset, f"opset {opset} gives it at most {schema.max_input} inputs")
    other = _REDEFINED.get(node.op_type)
    if node.op_type in _REDEFINED and (other is None or _attribute(node, other[0], None) == other[1]):
        raise _unfit(node, opset, f"opset {written} redefined it")


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    values = [helper.get_attribute_value(one) for one in node.attribute if one.name == name]
    return values[0] if values else default


def _remove(node: onnx.NodeProto, name: str) -> None:
    for attribute in [one for one in node.attribute if one.name == name]:
        node.attribute.remove(attribute)


def _unfit(node: onnx.NodeProto, opset: int, why: str) -> UsageError:
    return UsageError(
        f"the artifact can't be written in opset {opset}",
        where=f"{node.op_type} node '{node.name}'",
        why=why,
        hint=f"--opset {OPSET}, or give the target that opset, if its runtime reads it",
    )
