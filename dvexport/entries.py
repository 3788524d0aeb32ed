"""What a manifest says of a model's inputs, outputs, gates and tokens."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from dvexport.bundle.manifest import GateEntry, InputEntry, OutputEntry, TokenEntry
from dvexport.decisions import ACTION, TILES, TOKENS
from dvexport.graph.graph import DV, gate_name, static_shape, whole_clip_of
from dvexport.graph.match import is_op
from dvexport.graph.state import states_of
from dvexport.passes.expose_probes import decision_values
from dvexport.passes.lowerings import takes_lowering
from dvexport.passes.pipeline import Lowered
from dvexport.ports import Output, input_shapes, outputs_of
from dvexport.tokens import TellsTokens

__all__ = ["gate_entries", "input_entries", "output_entries", "token_entry"]


def input_entries(net: Any, mode: str) -> list[InputEntry]:
    """Return the inputs, the video first, which alone has a preprocessing."""
    frames = net.preprocess.frames if mode == "clip" else 1
    return [
        InputEntry(name=name, shape=(frames, *shape), dtype="float32", preprocess=None if index else net.preprocess)
        for index, (name, shape) in enumerate(input_shapes(net).items())
    ]


def output_entries(lowered: Lowered, mode: str, net: Any) -> list[OutputEntry]:
    """Return the outputs but the states, decisions last; the first size of all is frames, or one whole clip."""
    states = {state.output for state in states_of(lowered.model)}
    meant = {output.name: output for output in outputs_of(net)}
    frames = net.preprocess.frames if mode == "clip" else 1
    if whole_clip_of(lowered.model) is not None:
        frames = 1
    return [
        OutputEntry(
            name=value.name,  # type: ignore[arg-type]
            shape=(frames, *static_shape(value)[1:]),
            dtype=str(value.dtype.numpy()),  # type: ignore[arg-type,union-attr]
            **_meaning(meant.get(value.name or "")),
        )
        for value in lowered.model.graph.outputs
        if value.name not in states
    ]


def _meaning(output: Output | None) -> dict[str, Any]:
    """Return the kind and labels of an output, those of logits aside, which are the manifest's; decisions have none."""
    if output is None:
        return {}
    return {"kind": output.kind, "labels": [] if output.kind == "logits" else list(output.labels)}


def gate_entries(traced: ir.Model, lowered: Lowered) -> list[GateEntry]:
    """Describe every gate by its decisions and its choice."""
    decided = decision_values(traced)
    widths: dict[str, int] = {}
    for node in traced.graph:
        if takes_lowering(node):
            widths.setdefault(gate_name(node), int(node.outputs[0].shape[1]))  # type: ignore[index,arg-type]
    entries = []
    for choice in lowered.choices:
        names = [
            name
            for name, kind in ((ACTION.over, ACTION.name), (TILES.over, TILES.name))
            if (choice.gate, kind) in decided
        ]
        tiles = decided.get((choice.gate, TILES.name))
        assert tiles is None or tiles.shape is not None
        grid = None if tiles is None else (int(tiles.shape[1]), int(tiles.shape[2]))  # type: ignore[index,arg-type]
        entries.append(
            GateEntry(
                name=choice.gate,
                kind="+".join(names) or "none",
                channels=widths[choice.gate],
                grid=grid,
                lowering=choice.lowering,
                reason=choice.reason,
                overridden=choice.overridden,
                expected_ms={name: round(ms, 4) for name, ms in choice.expected_ms.items()},
            )
        )
    return entries + [_token_gate(node) for node in traced.graph if is_op(node, "SelectTokens", domain=DV)]


def token_entry(net: Any) -> TokenEntry | None:
    """Return where the tokens lie of a model that tells."""
    if not isinstance(net, TellsTokens) or not net.token_groups:
        return None
    stages = net.token_groups
    return TokenEntry(
        grid=net.token_grid,
        stages=[[stage.gate(group) for group in range(stage.groups)] for stage in stages],
        grids=[getattr(stage, "grid", None) for stage in stages],
    )


def _token_gate(node: ir.Node) -> GateEntry:
    assert node.inputs[0] is not None
    _, tokens, channels = static_shape(node.inputs[0])
    return GateEntry(
        name=gate_name(node),
        kind=TOKENS.over,
        channels=channels,
        tokens=(node.attributes["keep"].as_int(), tokens),
        lowering="top-k",
        reason="every shape is fixed: what is dropped is never computed",
    )
