"""Small helpers over onnx-ir that the dialect, the trace and the passes share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from dvexport.errors import PassError

__all__ = [
    "DECIDES",
    "DOMAINS",
    "DV",
    "FRAMES",
    "OPSET",
    "Builder",
    "array_of",
    "branch",
    "depends_on_input",
    "fresh_output",
    "gate_name",
    "known_shape",
    "make_contiguous",
    "mark_whole_clip",
    "replace_node",
    "scopes_of",
    "source_of",
    "static_shape",
    "whole_clip_of",
]

DV = "dv"
"""The custom operator domain."""
DOMAINS = ("", "ai.onnx", DV)
"""Domains of all operators: the standard one by both its names, and ours. Those of others may do anything."""
DECIDES = "dv.decides"
"""Metadata of a node that is there for decisions: of which kind (`passes/mark_decisions.py`)."""
FRAMES = "frames"
"""The symbol of the frame axis in a traced model."""
OPSET = 20
"""The standard opset that traces, references and lowerings are written in."""


class Builder:
    """Collects new nodes; insert them with `replace_node` or hand them to a graph or function."""

    def __init__(self, prefix: str = "dv", metadata: Mapping[str, str] | None = None) -> None:
        self.nodes: list[ir.Node] = []
        self._prefix = prefix
        self.metadata = dict(metadata or {})
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        shape: Sequence[int | str | ir.SymbolicDim] | None = None,
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Add a node with one output and return the output."""
        return self.multi(op_type, inputs, 1, domain=domain, shape=shape, dtype=dtype, **attributes)[0]

    def multi(
        self,
        op_type: str,
        inputs: Iterable[ir.Value | None],
        outputs: int,
        *,
        domain: str = "",
        shape: Sequence[int | str | ir.SymbolicDim] | None = None,
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Add a node with several outputs; `shape` and `dtype` are those of the first."""
        attrs = ir.convenience.convert_attributes({k: v for k, v in attributes.items() if v is not None})
        node = ir.Node(domain, op_type, list(inputs), attrs, num_outputs=outputs, metadata_props=dict(self.metadata))
        first = node.outputs[0]
        if shape is not None:
            first.shape = ir.Shape(shape)
        if dtype is not None:
            first.type = ir.TensorType(dtype)
        self.nodes.append(node)
        return tuple(node.outputs)

    def const(self, value: Any, dtype: Any = None) -> ir.Value:
        """Return a constant; equal constants of one builder are made once."""
        array = np.asarray(value, dtype=dtype, order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            output = self.op("Constant", value=ir.tensor(array))
            output.shape = ir.Shape(array.shape)
            output.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
            output.const_value = ir.tensor(array)
            self._constants[key] = output
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """Return a 1-D int64 constant."""
        return self.const(np.array(values, np.int64))


def branch(builder: Builder, output: ir.Value, name: str) -> ir.Graph:
    """Close the nodes of `builder` into a branch of a conditional that yields `output`."""
    if not any(output in node.outputs for node in builder.nodes):
        output = builder.op("Identity", output)  # a branch must produce its output itself
    return ir.Graph([], [output], nodes=builder.nodes, opset_imports={"": OPSET}, name=name)


def replace_node(node: ir.Node, builder: Builder, outputs: Sequence[ir.Value | None]) -> None:
    """Put the builder's nodes in the place of `node`, whose outputs become `outputs`.

    Names, shapes and types of the old outputs are kept.
    """
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, builder.nodes)
    for old, new in zip(node.outputs, outputs, strict=True):
        if new is None:
            continue
        new.shape = new.shape or old.shape
        new.type = new.type or old.type
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        if old.name and new.producer() in builder.nodes:
            old_name, old.name = old.name, None
            new.name = old_name
    graph.remove(node, safe=True)


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """Return the constant a value holds, or None if it is not constant."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def make_contiguous(model: ir.Model) -> None:
    """Store folded constants in C order, which comparing their bytes needs; what holds them already stays."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            array = value.const_value.numpy() if value.const_value is not None else None
            if array is not None and not array.flags.c_contiguous:
                value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)


def static_shape(value: ir.Value) -> tuple[int, ...]:
    """Return a value's shape; PassError if any dimension is unknown."""
    if not _is_static(value):
        raise PassError("a shape must be static here", where=value.name, why=f"its shape is {value.shape}")
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type,union-attr]


def known_shape(value: ir.Value) -> tuple[int, ...]:
    """Return a value's shape, () if any dimension is unknown."""
    return static_shape(value) if _is_static(value) else ()


def _is_static(value: ir.Value) -> bool:
    return value.shape is not None and all(isinstance(d, int) for d in value.shape)


_WHOLE_CLIP = "dv.whole_clip"


def mark_whole_clip(model: ir.Model, frames: int) -> None:
    """Note that a model reads a clip of `frames` frames as one: its frame axis is fixed, its logits are one row."""
    model.metadata_props[_WHOLE_CLIP] = str(frames)


def whole_clip_of(model: ir.Model) -> int | None:
    """Return the frames of the clip that a model reads as one; None for a model that works frame by frame."""
    frames = model.metadata_props.get(_WHOLE_CLIP)
    return None if frames is None else int(frames)


def gate_name(node: ir.Node) -> str:
    """Return the gate a dialect node belongs to, or an empty string."""
    attribute = node.attributes.get("gate")
    return "" if attribute is None else attribute.as_string()


def depends_on_input(value: ir.Value | None, but: Collection[ir.Value] = ()) -> bool:
    """Tell whether the numbers of a value depend on an input of the graph, those of `but` left out; shapes don't."""
    waiting, met = [value], set(but)
    while waiting:
        one = waiting.pop()
        if one is None or one in met:
            continue
        met.add(one)
        node = one.producer()
        if node is None:
            if one.is_graph_input():
                return True
            continue
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            return True  # what its branches read is not among its inputs
        waiting += [] if node.op_type in ("Shape", "Size") else node.inputs
    return False


def scopes_of(node: ir.Node) -> list[str]:
    """Return the modules a node was traced in, the outermost first, then its own name."""
    scope = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    return scope.strip("[]").replace("'", "").split(", ")


def source_of(node: ir.Node) -> str:
    """Say where a node came from in the model, for messages."""
    scopes = scopes_of(node)  # each holds those before it; the last is the node
    place = scopes[-2] if len(scopes) > 1 else ""
    name = f"{node.op_type} node '{node.name}'"
    return f"{name} in {place}" if place else name


def fresh_output(graph: ir.Graph, name: str, value: ir.Value) -> ir.Value:
    """Append `value` as a graph output called `name`.

    An Identity keeps the name apart when the value is already an input or an output.
    """
    if value.is_graph_input() or value.is_graph_output() or value.is_initializer():
        node = ir.Node("", "Identity", [value])
        node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
        graph.append(node)
        value = node.outputs[0]
    value.name = name
    graph.outputs.append(value)
    return value
