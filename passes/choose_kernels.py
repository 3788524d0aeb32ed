"""Leave every gate to the kernels of a backend whose work follows each decision exactly.

Nothing has to be weighed: such kernels take output channels, tiles and input channels as lists, and choose
between algorithms at run time, when the decisions are known.
"""

from __future__ import annotations

import onnx_ir as ir

from dvexport.graph.graph import gate_name
from dvexport.passes.choose_lowering import Choice
from dvexport.passes.lowerings import KERNELS, choose, takes_lowering

__all__ = ["ChooseKernels"]

_REASON = "work follows channels, tiles and inputs exactly; the algorithm is chosen at run time"


class ChooseKernels(ir.passes.InPlacePass):
    """Mark every node that takes a lowering, so that `split_paths` computes what is asked for and nothing else.

    Attributes:
        choices: one for each gate.
    """

    def __init__(self) -> None:
        super().__init__()
        self.choices: list[Choice] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Mark node by node."""
        gates = {}
        for node in model.graph:
            if takes_lowering(node):
                choose(node, KERNELS)
                gates[gate_name(node)] = Choice(gate_name(node), KERNELS, _REASON)
        self.choices = list(gates.values())
        return ir.passes.PassResult(model, bool(gates))
