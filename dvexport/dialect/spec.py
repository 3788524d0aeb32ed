"""What an operator of the `dv` domain is: one specification, from which all else follows.

`Operator.reference` writes the operator in standard ONNX. The same text serves as the
model-local function that lets a gate-level model run in any ONNX runtime (the oracle),
and as the masked lowering.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from dvexport.decisions import Key
from dvexport.dialect.gated_macs import GatedMacs
from dvexport.errors import PassError
from dvexport.graph.graph import DV, OPSET, Builder, gate_name, source_of
from dvexport.graph.match import attributes_of
from dvexport.names import name_problem

__all__ = ["OPERATORS", "Operator", "attach_references", "decisions_at", "operator_of", "specification"]

OPERATORS: dict[str, Operator] = {}
"""Every operator of the dialect by name."""


class Operator:
    """One operator of the dialect.

    A subclass states `name`, `inputs` and `outputs` (names; a trailing `?` marks an optional
    one) and `attributes` (name to default, or None when it must be given), and implements
    `reference` and `problems`. What passes ask about a node has an answer here that fits an operator
    without a gate or a memory; one that has them overrides it:

    - `decisions`: kinds of decisions, and the input or output that holds each (`decided`);
    - `dense`: the inputs that the dense model needs, None for all;
    - `gated_macs`: what a node executes, as a function of decisions;
    - `drop_gate`: the node without its gate;
    - `stream`: what the node keeps from one frame of a stream to the next;
    - `part`: the operator that recomputes a part of the output, by input names that both share; an operator
      that has one is given a lowering, gate by gate;
    - `promised`: the input that promises which channels of the first input are not zero;
    - `ordinary`: the standard operator that this one is without decisions and promises (`adopts`);
    - `output_channels`, `input_channels`: the inputs that have a value for each channel of the first output or of
      the first input, and the axis of these.
    """

    name: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    outputs: ClassVar[tuple[str, ...]]
    attributes: ClassVar[Mapping[str, Any]] = {}
    decisions: ClassVar[Mapping[str, str]] = {}
    dense: ClassVar[tuple[str, ...] | None] = None
    part: ClassVar[str] = ""
    promised: ClassVar[str] = ""
    ordinary: ClassVar[str] = ""
    output_channels: ClassVar[Mapping[str, int]] = {}
    input_channels: ClassVar[Mapping[str, int]] = {}

    def __init_subclass__(cls) -> None:
        OPERATORS[cls.name] = cls()

    def reference(
        self, build: Builder, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any]
    ) -> Sequence[ir.Value]:
        """Write the operator in standard ONNX and return its outputs."""
        raise NotImplementedError(f"{self.name} has no reference")

    def infer(self, node: ir.Node) -> None:
        """Set the shape and type of the first output: those of the first input unless overridden."""
        node.outputs[0].shape = node.outputs[0].shape or node.inputs[0].shape  # type: ignore[union-attr]
        node.outputs[0].type = node.outputs[0].type or node.inputs[0].type  # type: ignore[union-attr]

    def problems(self, node: ir.Node) -> list[str]:
        """Return what is illegal about a node; subclasses add their own rules."""
        found = []
        if len(node.inputs) > len(self.inputs):
            found.append(f"has {len(node.inputs)} inputs, at most {len(self.inputs)} are defined")
        for name, value in self.bind(node).items():
            if value is None and f"{name}?" not in self.inputs:
                found.append(f"lacks input {name}")
        found += [f"has unknown attribute {name}" for name in node.attributes if name not in self.attributes]
        found += [
            f"lacks attribute {name}"
            for name, default in self.attributes.items()
            if default is None and name not in node.attributes
        ]
        for name in ("gate", "name"):  # names of gates and states: keys of bundles
            if name in self.attributes and name in node.attributes:
                problem = name_problem(node.attributes[name].value)
                found += [f"has {name} {problem}"] if problem else []
        return found

    def bind(self, node: ir.Node) -> dict[str, ir.Value | None]:
        """Return the node's inputs by name, None for those left out."""
        values = list(node.inputs) + [None] * (len(self.inputs) - len(node.inputs))
        return {name.rstrip("?"): value for name, value in zip(self.inputs, values, strict=False)}

    def attributes_of(self, node: ir.Node) -> dict[str, Any]:
        """Return the node's attributes with defaults filled in."""
        return {**self.attributes, **attributes_of(node)}

    def decided(self, node: ir.Node) -> dict[str, ir.Value]:
        """Return the decisions that a node holds, by kind."""
        outputs = zip((name.rstrip("?") for name in self.outputs), node.outputs, strict=False)
        held = {**self.bind(node), **dict(outputs)}
        found = {kind: held.get(name) for kind, name in self.decisions.items()}
        return {kind: value for kind, value in found.items() if value is not None}

    def dense_inputs(self, node: ir.Node) -> list[ir.Value]:
        """Return the inputs that matter when every gate computes everything."""
        wanted = self.bind(node)
        names = wanted if self.dense is None else self.dense
        return [value for name in names if (value := wanted[name]) is not None]

    def gated_macs(self, node: ir.Node, actions: Mapping[ir.Value, str]) -> GatedMacs | None:
        """Return how many MACs a node executes as a function of decisions; None: it has none that a gate governs.

        Args:
            actions: the first gate that takes each action of the model.
        """
        return None

    def drop_gate(self, model: ir.Model, node: ir.Node) -> bool:
        """Make the node what it is in the dense model, in place; return whether anything changed."""
        return False

    def adopts(self, node: ir.Node) -> bool:
        """Tell whether a standard node, with its inputs in the same order, could be one of these."""
        return False

    def position(self, name: str) -> int:
        """Return where an input stands; PassError if there is none of this name."""
        for position, each in enumerate(self.inputs):
            if each.rstrip("?") == name:
                return position
        raise PassError(f"{self.name} has no input '{name}'")

    def stream(self, model: ir.Model, node: ir.Node) -> None:
        """Turn what the node keeps across frames into states of the model, in place; one frame a step.

        Raises:
            TraceError: it starts from something else than zeros.
        """

    def expand(self, node: ir.Node, build: Builder) -> Sequence[ir.Value]:
        """Write the reference of `node` into `build`, over the node's own inputs."""
        return self.reference(build, self.bind(node), self.attributes_of(node))


def operator_of(node: ir.Node) -> Operator | None:
    """Return the specification of a dialect node, or None for any other node."""
    return OPERATORS.get(node.op_type) if node.domain == DV else None


def specification(node: ir.Node) -> Operator:
    """Return the specification of a dialect node; PassError for any other node."""
    operator = operator_of(node)
    if operator is None:
        raise PassError(f"{node.op_type} is no operator of the dialect", where=source_of(node))
    return operator


def decisions_at(node: ir.Node) -> dict[Key, ir.Value]:
    """Return the decisions that a gate-level node takes, or makes."""
    operator = operator_of(node)
    held = {} if operator is None else operator.decided(node)
    return {(gate_name(node), kind): value for kind, value in held.items()}


def attach_references(model: ir.Model) -> ir.Model:
    """Give every dialect node its reference as a model-local function.

    A function serves all nodes that differ only in their inputs' values: the overload name is
    a digest of what the text depends on (which inputs are given, shapes, attributes).
    """
    for node in model.graph.all_nodes():
        operator = operator_of(node)
        if operator is None:
            continue
        node.overload = _digest(operator, node)
        key = (DV, operator.name, node.overload)
        if key not in model.functions:
            model.functions[key] = _function(operator, node)
    model.graph.opset_imports.setdefault(DV, 1)
    return model


def _digest(operator: Operator, node: ir.Node) -> str:
    shapes = [None if v is None else str(v.shape) for v in node.inputs]
    text = f"{operator.name} {shapes} {sorted(operator.attributes_of(node).items())!r} {len(node.outputs)}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _function(operator: Operator, node: ir.Node) -> ir.Function:
    build = Builder()
    parameters = {
        name: None if value is None else ir.Value(name=name, shape=value.shape, type=value.type)
        for name, value in operator.bind(node).items()
    }
    outputs = list(operator.reference(build, parameters, operator.attributes_of(node)))[: len(node.outputs)]
    for inner in build.nodes:  # sizes known without a type can't be serialised, and need not be
        for value in inner.outputs:
            value.shape = value.shape if value.type is not None else None
    given = [p or ir.Value(name=name) for name, p in parameters.items()][: len(node.inputs)]
    graph = ir.Graph(given, outputs, nodes=build.nodes, opset_imports={"": OPSET})
    return ir.Function(DV, operator.name, node.overload, graph=graph, attributes=[])
