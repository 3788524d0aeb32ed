"""Make the decisions of every gate visible: as extra outputs, or as inputs that replace them.

Probes serve executed FLOPs, pictures and verification. Forced decisions serve measurement
at chosen rates and tests over random decisions; the gates' own policies stay in the graph, as
probes, so that their cost is still measured.
"""

from __future__ import annotations

import onnx_ir as ir

from dvexport.graph import DV, Builder, fresh_output, gate_name, static_shape

__all__ = ["ExposeProbes", "ForceDecisions", "decision_values", "decisions_at", "forced_name", "probe_name"]

_KINDS = {"action": 3, "tiles": 4}
"""Decision kind to its position among the inputs of `GatedConv`."""


def probe_name(gate: str, kind: str) -> str:
    """Name of the output that shows a decision; `kind` is `action`, `tiles` or `tokens`."""
    return f"probe.{gate}.{kind}"


def forced_name(gate: str, kind: str) -> str:
    """Name of the input that replaces a decision."""
    return f"force.{gate}.{kind}"


def decision_values(model: ir.Model) -> dict[tuple[str, str], ir.Value]:
    """Return each decision of a gate-level model by (gate, kind)."""
    found: dict[tuple[str, str], ir.Value] = {}
    for node in model.graph:
        for key, value in decisions_at(node).items():
            found.setdefault(key, value)
    return found


def decisions_at(node: ir.Node) -> dict[tuple[str, str], ir.Value]:
    """Return the decisions that a gate-level node takes, or makes, by (gate, kind)."""
    if node.domain == DV and node.op_type == "SelectTokens":
        return {(gate_name(node), "tokens"): node.outputs[1]}
    if node.domain != DV or node.op_type != "GatedConv":
        return {}
    given = {kind: node.inputs[position] for kind, position in _KINDS.items() if position < len(node.inputs)}
    return {(gate_name(node), kind): value for kind, value in given.items() if value is not None}


class ExposeProbes(ir.passes.InPlacePass):
    """Add an output for every decision. Requires: the model is still at gate level."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Two gates that share a decision get an output each."""
        found = decision_values(model)
        for (gate, kind), value in found.items():
            fresh_output(model.graph, probe_name(gate, kind), value)
        return ir.passes.PassResult(model, bool(found))


class ForceDecisions(ir.passes.InPlacePass):
    """Replace every decision by an input. Requires: gate level, frames fixed.

    The decisions the gates would have taken stay as probes (run `ExposeProbes` before).
    """

    def __init__(self, kinds: tuple[str, ...] = ("action", "tiles", "tokens")) -> None:
        super().__init__()
        self.kinds = kinds

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Redirect every use of a decision but its own probe.

        Of gates that share a decision each follows its own input; what else reads it follows the first gate's.
        """
        probes = {v.name for v in model.graph.outputs if (v.name or "").startswith("probe.")}
        found = {key: v for key, v in decision_values(model).items() if key[1] in self.kinds}
        forced: dict[tuple[str, str], ir.Value] = {}
        for key, value in found.items():
            forced[key] = ir.Value(name=forced_name(*key), shape=value.shape, type=value.type)
            model.graph.inputs.append(forced[key])
        for (gate, kind), value in found.items():
            if kind == "tokens":
                _take(value, forced[gate, kind])
            for user, position in list(value.uses()):
                if user.op_type == "Identity" and user.outputs[0].name in probes:
                    continue
                own = (gate_name(user), kind)
                user.replace_input_with(position, forced.get(own, forced[gate, kind]))
        return ir.passes.PassResult(model, bool(found))


def _take(index: ir.Value, forced: ir.Value) -> None:
    """Let what reads the tokens of a selection read those that `forced` names; `index` itself stays the gate's own."""
    node = index.producer()
    assert node is not None and node.graph is not None and node.inputs[0] is not None
    kept, x = node.outputs[0], node.inputs[0]
    build = Builder(metadata=node.metadata_props)
    batch, keep = static_shape(forced)
    place = build.op("Unsqueeze", forced, build.ints(2), shape=[batch, keep, 1], dtype=ir.DataType.INT64)
    taken = build.op("GatherND", x, place, batch_dims=1, shape=list(static_shape(kept)), dtype=x.dtype)
    node.graph.insert_after(node, build.nodes)
    ir.convenience.replace_all_uses_with(kept, taken, replace_graph_outputs=True)
