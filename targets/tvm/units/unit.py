"""A unit of work: nodes of the graph that are done together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import onnx_ir as ir

from dvexport.graph.graph import array_of

__all__ = ["Unit"]


@dataclass
class Unit:
    """Nodes that are done together.

    Attributes:
        kind: a name of `units/catalogue.py`.
        nodes: in graph order.
        inputs: values read from outside, constants left out.
        outputs: values that others or the host read.
        gate: the gate it belongs to, or nothing.
        reads: what it reads, where its nodes read only views of that; None: what its nodes read.
    """

    kind: str
    nodes: list[ir.Node]
    inputs: list[ir.Value] = field(default_factory=list)
    outputs: list[ir.Value] = field(default_factory=list)
    gate: str = ""
    reads: list[ir.Value] | None = None

    @property
    def output(self) -> ir.Value:
        """Its only output."""
        (output,) = self.outputs
        return output

    @property
    def last(self) -> ir.Node:
        """The node where it runs: by then all that it reads has been computed."""
        return self.nodes[-1]

    def grow(self) -> None:
        """Add nodes whose results only this unit reads; most kinds have all of theirs from the beginning."""

    def set_edges(self, read: Collection[ir.Value]) -> None:
        """Set `inputs` and `outputs`.

        Args:
            read: values that units of the model read past views of them (`reads`).
        """
        inside = set(self.nodes)
        reads = [v for node in self.nodes for v in node.inputs if v is not None] if self.reads is None else self.reads
        outside = [v for v in reads if array_of(v) is None and v.producer() not in inside]
        self.inputs = list(dict.fromkeys(outside))
        written = [v for node in self.nodes for v in node.outputs]
        self.outputs = [
            v for v in written if v.is_graph_output() or v in read or any(user not in inside for user, _ in v.uses())
        ]
