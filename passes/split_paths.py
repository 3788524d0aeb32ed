"""Split a gated convolution into what is computed now, what is still owed, and what is kept.

A stream keeps V of the previous frame only where that frame computed it. Reuse of another part is
computed now, from the previous input (lazy reuse): total work equals the paper's lookahead
(D-STEP Eq. 2), and the result is exact and causal. With keep x S the part of V that the
previous frame computed, the part owed is a union of two products:

    (reuse and not keep_prev) x S        and        (reuse and keep_prev) x (S and not S_prev)

A lowering that computes all channels of a tile owes less: S and not S_prev, if anything is
reused. A clip knows the next frame: V is computed where this frame or the next one needs it.

The states say what is stale, not what is valid, because states start as zeros and before the first
frame V is zero everywhere, which is its exact value: nothing is owed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dvexport.decisions import Action
from dvexport.dialect.spec import OPERATORS, specification
from dvexport.graph.graph import DV, Builder, gate_name, replace_node, static_shape
from dvexport.graph.match import attributes_of
from dvexport.graph.state import add_state, remove_state, state_input, states_of
from dvexport.passes.lowerings import KERNELS, LOWERINGS, MASKED, lowering_of, takes_lowering

__all__ = ["SplitPaths"]


class SplitPaths(ir.passes.InPlacePass):
    """Turn every gated node whose gate is not lowered to a mask into its `part` (`SparseConv`) and `Merge`.

    Requires: frames fixed, a lowering chosen for every gate.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Split node by node."""
        modified = False
        for node in list(model.graph):
            if not takes_lowering(node) or lowering_of(node) == MASKED:
                continue
            split = _Split.of(model, node)
            streams = any(state.name == f"{split.gate}.history" for state in states_of(model))
            if split.inputs["action"] is None:
                _plain(split)
            elif not streams:
                _clip(split)
            elif _by_channel(lowering_of(node)):
                _stream_channels(split)
            else:
                _stream_tiles(split)
            modified = True
        return ir.passes.PassResult(model, modified)


def _by_channel(lowering: str) -> bool:
    return lowering == KERNELS or LOWERINGS[lowering].follows == "action"


@dataclass
class _Split:
    """One node being split: its inputs by name and the nodes written so far."""

    model: ir.Model
    node: ir.Node
    inputs: Mapping[str, ir.Value | None]
    build: Builder
    gate: str

    @classmethod
    def of(cls, model: ir.Model, node: ir.Node) -> _Split:
        operator = specification(node)
        return cls(model, node, operator.bind(node), Builder(metadata=node.metadata_props), gate_name(node))

    @property
    def tiles(self) -> ir.Value | None:
        return self.inputs["tiles"]

    def sparse(
        self,
        x: ir.Value | None,
        *,
        rows: ir.Value | None = None,
        tiles: ir.Value | None = None,
        base: ir.Value | None = None,
    ) -> ir.Value:
        """Write the operator's `part` with this node's weight.

        A promise of zero channels speaks of this frame's input only: what is owed reads the previous one's.
        """
        operator = specification(self.node)
        part = OPERATORS[operator.part]
        given = {**self.inputs, "X": x, "rows": rows, "tiles": tiles, "base": base}
        if operator.promised and x is not self.inputs["X"]:
            given[operator.promised] = None
        inputs = [given.get(name.rstrip("?")) for name in part.inputs]
        out = self.build.op(part.name, *inputs, domain=DV, **attributes_of(self.node))
        out.shape, out.type = self.node.outputs[0].shape, self.node.outputs[0].type
        return out

    def merge(self, v: ir.Value, history: ir.Value) -> ir.Value:
        """Write the `Merge` of this node's decisions."""
        out = self.build.op("Merge", v, history, self.inputs["action"], self.tiles, domain=DV, gate=self.gate)
        out.shape, out.type = self.node.outputs[0].shape, self.node.outputs[0].type
        return out

    def chosen(self, action: Action) -> ir.Value:
        """Channels of one action, bool `[N, Cout]`."""
        return self._bool("Equal", self.inputs["action"], self.build.const(int(action), np.int64))

    def both(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self._bool("And", a, b)

    def negated(self, a: ir.Value) -> ir.Value:
        return self._bool("Not", a)

    def _bool(self, op_type: str, *inputs: ir.Value | None) -> ir.Value:
        out = self.build.op(op_type, *inputs, dtype=ir.DataType.BOOL)
        shapes = [v.shape for v in inputs if v is not None and v.shape is not None and len(v.shape)]
        out.shape = max(shapes, key=lambda s: int(np.prod([int(d) for d in s])), default=None)  # type: ignore[arg-type]
        return out

    def any_of(self, channels: ir.Value) -> ir.Value:
        """True where a frame has any of the channels, bool `[N, 1, 1]` (a scalar for one frame)."""
        as_number = self.build.op("Cast", channels, to=ir.DataType.FLOAT)
        if static_shape(channels)[0] == 1:
            most = self.build.op("ReduceMax", as_number, keepdims=0)
            return self.build.op("Cast", most, to=ir.DataType.BOOL, shape=[], dtype=ir.DataType.BOOL)
        most = self.build.op("ReduceMax", as_number, self.build.ints(1), keepdims=1)
        found = self.build.op("Cast", most, to=ir.DataType.BOOL)
        shape = [static_shape(channels)[0], 1, 1]
        return self.build.op("Unsqueeze", found, self.build.ints(2), shape=shape, dtype=ir.DataType.BOOL)

    def finish(self, u: ir.Value) -> None:
        replace_node(self.node, self.build, [u, *[None] * (len(self.node.outputs) - 1)])


def _plain(split: _Split) -> None:
    """No action, no history: only the active tiles are computed."""
    split.finish(split.sparse(split.inputs["X"], tiles=split.tiles))


def _clip(split: _Split) -> None:
    """V where frame n keeps it or frame n + 1 reuses it; history is V shifted by a frame."""
    build, tiles = split.build, split.tiles
    need = None
    if tiles is not None:
        now = split.both(tiles, split.any_of(split.chosen(Action.COMPUTE)))
        later = split.both(tiles, split.any_of(split.chosen(Action.REUSE)))
        frames, *grid = static_shape(tiles)
        tail = build.const(np.zeros((1, *grid), bool))
        shifted = build.op(
            "Slice", build.op("Concat", later, tail, axis=0), build.ints(1), build.ints(frames + 1), build.ints(0)
        )
        need = build.op("Or", now, shifted, shape=[frames, *grid], dtype=ir.DataType.BOOL)
    v = split.sparse(split.inputs["X"], tiles=need)
    zeros = build.const(np.zeros((1, *static_shape(v)[1:]), np.float32))
    history = build.op("Delay", v, zeros, domain=DV, name=f"{split.gate}.history")
    history.shape, history.type = v.shape, v.type
    split.finish(split.merge(v, history))


def _stream_tiles(split: _Split) -> None:
    """All channels of the active tiles; reuse owes the tiles that were not active before."""
    model, tiles, x = split.model, split.tiles, split.inputs["X"]
    assert tiles is not None and x is not None
    read_v = _drop_history(split)
    read_x = state_input(model, f"{split.gate}.x", x)
    stale = state_input(model, f"{split.gate}.stale_tiles", tiles)
    owed = split.both(split.both(tiles, stale), split.any_of(split.chosen(Action.REUSE)))
    history = split.sparse(read_x, tiles=owed, base=read_v)
    v = split.sparse(x, tiles=tiles, base=read_v)
    now_stale = split.negated(tiles)
    split.finish(split.merge(v, history))
    add_state(model, f"{split.gate}.v", read_v, v)
    add_state(model, f"{split.gate}.x", read_x, x)
    add_state(model, f"{split.gate}.stale_tiles", stale, now_stale)


def _stream_channels(split: _Split) -> None:
    """Exactly the channels asked for; V holds the history in the channels reused."""
    model, tiles, x = split.model, split.tiles, split.inputs["X"]
    assert x is not None
    keep, reuse = split.chosen(Action.COMPUTE), split.chosen(Action.REUSE)
    read_v = _drop_history(split)
    read_x = state_input(model, f"{split.gate}.x", x)
    stale = state_input(model, f"{split.gate}.stale_channels", keep)
    history = split.sparse(read_x, rows=split.both(reuse, stale), tiles=tiles, base=read_v)
    if tiles is not None:
        stale_tiles = state_input(model, f"{split.gate}.stale_tiles", tiles)
        owed = split.both(tiles, stale_tiles)
        history = split.sparse(read_x, rows=split.both(reuse, split.negated(stale)), tiles=owed, base=history)
    v = split.sparse(x, rows=keep, tiles=tiles, base=history)
    now_stale = split.negated(keep)
    now_stale_tiles = None if tiles is None else split.negated(tiles)
    split.finish(split.merge(v, v))
    add_state(model, f"{split.gate}.v", read_v, v)
    add_state(model, f"{split.gate}.x", read_x, x)
    add_state(model, f"{split.gate}.stale_channels", stale, now_stale)
    if now_stale_tiles is not None:
        add_state(model, f"{split.gate}.stale_tiles", stale_tiles, now_stale_tiles)


def _drop_history(split: _Split) -> ir.Value:
    """Replace the dense history state by the input half of the lazy one."""
    old, _ = remove_state(split.model, f"{split.gate}.history")
    return state_input(split.model, f"{split.gate}.v", old)
