"""Make the decisions of every gate visible: as extra outputs, or as inputs that replace them.

Probes serve executed FLOPs, pictures and verification. Forced decisions serve measurement
at chosen rates and tests over random decisions; the gates' own policies stay in the graph, as
probes, so that their cost is still measured.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import onnx_ir as ir

from dvexport.decisions import ACTION, KINDS, PROBE, TOKENS, Key, forced_name, probe_name
from dvexport.dialect.spec import decisions_at, operator_of
from dvexport.graph.graph import Builder, depends_on_input, fresh_output, gate_name, static_shape
from dvexport.graph.match import is_op
from dvexport.passes.lowerings import takes_lowering
from dvexport.passes.propagate_inactive import PropagateInactive

__all__ = ["ExposeProbes", "ForceDecisions", "decision_values", "forced_alone", "used_elsewhere"]


def decision_values(model: ir.Model) -> dict[Key, ir.Value]:
    """Return each decision of a gate-level model by (gate, kind)."""
    found: dict[Key, ir.Value] = {}
    for node in model.graph:
        for key, value in decisions_at(node).items():
            found.setdefault(key, value)
    return found


def used_elsewhere(model: ir.Model) -> set[Key]:
    """Return the decisions of a gate-level model that anything but a gated convolution reads, promises included."""
    found = decision_values(model)
    return {
        key for key, value in found.items()
        if value.is_graph_output() or any(not takes_lowering(node) for node, _ in value.uses())
    }  # fmt: skip


def forced_alone(model: ir.Model) -> bool:
    """Tell whether a gate-level model is forced by replacing the decisions that it shows, and those alone.

    It is not where a gate's convolutions read two values of one decision, or where a promise of zero channels
    follows from what decides and not from the decision.
    """
    found = decision_values(model)
    if any(value is not found[gate, kind] for gate, kind, value in _decisions_read(model, found)):
        return False
    return not any(depends_on_input(promise, but=found.values()) for _, _, promise in _promises(model))


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

    def __init__(self, kinds: Collection[str] = KINDS.keys()) -> None:
        super().__init__()
        self.kinds = kinds

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Redirect every use of a decision but its own probe.

        Gates that share a decision each follow an input of their own; other readers follow the first gate's input.
        """
        probes = {v.name for v in model.graph.outputs if (v.name or "").startswith(PROBE)}
        found = {key: v for key, v in decision_values(model).items() if key[1] in self.kinds}
        forced: dict[Key, ir.Value] = {}
        for key, value in found.items():
            forced[key] = ir.Value(name=forced_name(*key), shape=value.shape, type=value.type)
            model.graph.inputs.append(forced[key])
        for gate, kind, value in [*_decisions_read(model, found), *((*key, value) for key, value in found.items())]:
            if kind == TOKENS.name:
                _take(value, forced[gate, kind])
            for user, position in list(value.uses()):
                if is_op(user, "Identity") and user.outputs[0].name in probes:
                    continue
                own = (gate_name(user), kind)
                user.replace_input_with(position, forced.get(own, forced[gate, kind]))
            if value.is_graph_output() and value.name not in probes:
                _write(model.graph, value, forced[gate, kind])
        if ACTION.name in self.kinds:
            _keep_promises(model, list(forced.values()))
        return ir.passes.PassResult(model, bool(found))


def _decisions_read(model: ir.Model, found: Mapping[Key, ir.Value]) -> list[tuple[str, str, ir.Value]]:
    """Return (gate, kind, value) of each decision of action or tiles, also where a gate's convolutions read copies."""
    read: dict[ir.Value, tuple[str, str, ir.Value]] = {}
    for node in model.graph:
        if not takes_lowering(node):
            continue
        for key, value in decisions_at(node).items():
            decision = found.get(key)
            if decision is not None and value.shape == decision.shape:
                read.setdefault(value, (*key, value))
    return list(read.values())


def _keep_promises(model: ir.Model, forced: Collection[ir.Value]) -> None:
    """Drop promises of zero channels that hold under the gates' own decisions only; those of forced ones take over."""
    for node, place, promise in list(_promises(model)):
        if depends_on_input(promise, but=forced):
            node.replace_input_with(place, None)
    PropagateInactive()(model)


def _promises(model: ir.Model) -> Iterator[tuple[ir.Node, int, ir.Value]]:
    """Yield (node, position of the input, value) of every promise of zero channels."""
    for node in model.graph:
        operator = operator_of(node)
        promise = operator.bind(node)[operator.promised] if operator is not None and operator.promised else None
        if operator is not None and promise is not None:
            yield node, operator.position(operator.promised), promise


def _write(graph: ir.Graph, state: ir.Value, forced: ir.Value) -> None:
    """Let a state that is written with a decision itself (`gates.delay` of it) be written with the forced one."""
    name, place = state.name, graph.outputs.index(state)
    build = Builder()
    written = build.op("Identity", forced, shape=list(static_shape(forced)), dtype=forced.dtype)
    graph.extend(build.nodes)
    state.name, written.name = f"{name}.own", name
    graph.outputs[place] = written


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
