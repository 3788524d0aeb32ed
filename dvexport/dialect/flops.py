"""Executed FLOPs: the multiply-accumulates (MACs) that an input's decisions ask for.

For a `GatedConv` with V computed on k x k windows of Cin channels, frame t executes, per output pixel of its
active tiles and per channel, as D-STEP Eq. 2 with its lookahead moved to the frame that reuses:

    compute now        keep_t x S_t
    owed by the past   (reuse_t and not keep_{t-1}) x S_t   and   (reuse_t and keep_{t-1}) x (S_t and not S_{t-1})

(nothing is owed at the first frame, whose history is zero), and its consumer pays for the channels
that are not skipped, `(a_t != 0) x S_t`. Decisions themselves (policies, masks) are counted apart from
the rest of the network, which always runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import onnx_ir as ir

from dvexport.decisions import ACTION, PROBE
from dvexport.dialect.gated_macs import Decisions, GatedMacs
from dvexport.dialect.spec import operator_of
from dvexport.graph.graph import gate_name
from dvexport.graph.match import is_op

__all__ = ["Decisions", "ExecutedFlops", "FlopTable", "GatedMacs", "dense_nodes", "flop_table"]


@dataclass(frozen=True)
class ExecutedFlops:
    """MACs executed: `frames` in total a frame, `gates` those of each gate's convolutions a frame."""

    frames: list[int]
    gates: dict[str, list[int]]


@dataclass(frozen=True)
class FlopTable:
    """MACs of a model, per frame; per clip for a model that reads the clip as one.

    Attributes:
        fixed: what always runs and the dense model has too (stem, downsamples, head).
        decisions: what takes the decisions (policies, masks); the dense model has none.
        gated: the gated convolutions.
        unpruned: what takes the place of `fixed` in the dense model where that has more tokens; None: the same.
    """

    fixed: int
    decisions: int
    gated: list[GatedMacs] = field(default_factory=list)
    unpruned: int | None = None

    @property
    def dense(self) -> int:
        """MACs of the dense model on one frame."""
        fixed = self.fixed if self.unpruned is None else self.unpruned
        return fixed + sum(conv.dense for conv in self.gated)

    @property
    def gates(self) -> list[str]:
        """Gate names in network order."""
        return list(dict.fromkeys(conv.gate for conv in self.gated))

    def dense_of(self, gate: str) -> int:
        """Dense MACs of one gate's convolutions on one frame."""
        return sum(conv.dense for conv in self.gated if conv.gate == gate)

    def executed(self, decisions: Sequence[Decisions]) -> ExecutedFlops:
        """Count a clip or stream from reset, frame by frame."""
        gates: dict[str, list[int]] = {gate: [0] * len(decisions) for gate in self.gates}
        for t, now in enumerate(decisions):
            for conv in self.gated:
                gates[conv.gate][t] += conv.executed(now, decisions[t - 1] if t else None)
        always = self.fixed + self.decisions
        frames = [always + sum(gates[gate][t] for gate in gates) for t in range(len(decisions))]
        return ExecutedFlops(frames, gates)

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads, for a manifest."""
        table = {"fixed": self.fixed, "decisions": self.decisions, "gated": [asdict(c) for c in self.gated]}
        return table if self.unpruned is None else {**table, "unpruned": self.unpruned}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlopTable:
        """Read what `to_dict` wrote."""
        gated = [GatedMacs(**{**row, "size": tuple(row["size"])}) for row in values["gated"]]
        return cls(values["fixed"], values["decisions"], gated, values.get("unpruned"))


def flop_table(model: ir.Model, dense: ir.Model | None = None) -> FlopTable:
    """Count a gate-level model, one frame; symbolic dimensions count as one.

    Args:
        model: with a fixed frame axis, one clip is counted.
        dense: the model without pruning, where it was traced apart.
    """
    in_dense = dense_nodes(model)
    actions = _actions(model)
    fixed = decisions = 0
    gated = []
    for node in model.graph:
        operator = operator_of(node)
        if operator is not None:
            macs = operator.gated_macs(node, actions)
            gated += [] if macs is None else [macs]
        elif node in in_dense:
            fixed += _macs(node)
        else:
            decisions += _macs(node)
    return FlopTable(fixed, decisions, gated, None if dense is None else flop_table(dense).fixed)


def dense_nodes(model: ir.Model) -> set[ir.Node]:
    """Nodes the logits depend on when every gate computes everything."""
    found: set[ir.Node] = set()
    waiting = [value.producer() for value in model.graph.outputs if not (value.name or "").startswith(PROBE)]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        operator = operator_of(node)
        inputs = node.inputs if operator is None else operator.dense_inputs(node)
        waiting += [value.producer() for value in inputs if value is not None]
    return found


def _actions(model: ir.Model) -> dict[ir.Value, str]:
    """Every action by the first gate that takes it."""
    found: dict[ir.Value, str] = {}
    for node in model.graph:
        operator = operator_of(node)
        action = None if operator is None else operator.decided(node).get(ACTION.name)
        if action is not None:
            found.setdefault(action, gate_name(node))
    return found


def _macs(node: ir.Node) -> int:
    """MACs of a standard node; anything but convolutions and matrix products counts nothing."""
    if is_op(node, "Conv"):
        return prod(_shape(node.inputs[1])[1:]) * prod(_shape(node.outputs[0]))
    if is_op(node, "Gemm", "MatMul"):
        left = _shape(node.inputs[0])
        depth = left[0 if node.attributes.get_int("transA", 0) else -1]
        return depth * prod(_shape(node.outputs[0]))
    return 0


def _shape(value: ir.Value | None) -> list[int]:
    if value is None or value.shape is None:
        return []
    return [dim if isinstance(dim, int) else 1 for dim in value.shape]
