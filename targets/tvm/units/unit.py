"""A unit of work: nodes of the graph that are done together."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

__all__ = ["Unit"]


@dataclass
class Unit:
    """Nodes that are done together.

    Attributes:
        kind: `conv`, `gemm`, `max_pool`, `avg_pool`, `mean`, `merge`, `relu`, `add`, `concat`, `slice`,
            `copy`, `island`, or one of `units_tokens.py`: `linear`, `attention`, `product`, `layer_norm`,
            `select_tokens`, `scatter`, `view`.
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
