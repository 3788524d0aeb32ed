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

from dvexport.actions import name_problem
from dvexport.graph.graph import DV, OPSET, Builder

__all__ = ["OPERATORS", "Operator", "attach_references", "operator_of"]

OPERATORS: dict[str, Operator] = {}
"""Every operator of the dialect by name."""


class Operator:
    """One operator of the dialect.

    A subclass states `name`, `inputs` and `outputs` (names; a trailing `?` marks an optional
    one) and `attributes` (name to default, or None when it must be given), and implements
    `reference`, `problems` and, if it does arithmetic worth counting, nothing more here:
    executed FLOPs are counted in `dvexport.dialect.flops`.
    """

    name: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    outputs: ClassVar[tuple[str, ...]]
    attributes: ClassVar[Mapping[str, Any]] = {}

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
        for name in ("gate", "name"):  # of the gate, of a state: keys of bundles
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
        given = {name: attribute.value for name, attribute in node.attributes.items()}
        return {**self.attributes, **given}

    def expand(self, node: ir.Node, build: Builder) -> Sequence[ir.Value]:
        """Write the reference of `node` into `build`, over the node's own inputs."""
        return self.reference(build, self.bind(node), self.attributes_of(node))


def operator_of(node: ir.Node) -> Operator | None:
    """Return the specification of a dialect node, or None for any other node."""
    return OPERATORS.get(node.op_type) if node.domain == DV else None


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
