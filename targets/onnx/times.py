"""The time of every node of an artifact, and of every gate, from ONNX Runtime's own recording.

The runtime rewrites a model before it runs it: it fuses nodes and adds ones that change layout. What it
made is matched to what it was given by the values that nodes produce, which keep their names.
A node belongs to the gate whose module it was traced from.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx

from dvexport.graph.graph import DECIDES
from dvexport.targets.roles import node_role
from dvexport.targets.times import NodeTime, NodeTimes, typical, warmed

__all__ = ["NodeProfile", "Owner", "child_scopes", "gates_of_nodes", "node_times"]

_SCOPES = "pkg.torch.onnx.name_scopes"
_RUN, _SUFFIX = "model_run", "_kernel_time"
"""Names of a step's event, and of the end of a node's."""
_BLOCKED = "_nchwc"
"""What the runtime adds to the name of a value for the node that makes it in its blocked layout."""


@dataclass(frozen=True)
class NodeProfile:
    """What ONNX Runtime recorded: its trace events, and the graph that it made of the model and ran."""

    events: list[dict[str, Any]]
    graph: onnx.ModelProto

    @property
    def steps(self) -> int:
        """How many steps were recorded."""
        return sum(event["name"] == _RUN for event in self.events)


class Owner(NamedTuple):
    """The gate a node belongs to, and whether the node is part of what takes its decision."""

    gate: str
    decides: bool = False


def node_times(profile: NodeProfile, gate_of: Mapping[str, Owner], passes: int) -> NodeTimes:
    """Return what a recording says of every node.

    Args:
        gate_of: owner by the name of a node or of a value, see `gates_of_nodes`.
        passes: how often the same frames were run, the first time as a warm-up.
    """
    owners = _owners(profile.graph, gate_of)
    steps, passes = _steps(profile.events)[warmed(profile.steps, passes) :], max(passes - 1, 1)
    shown = _median_step(steps)
    total: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(steps))
    per_gate: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(steps))
    ops: dict[str, str] = {}
    for index, step in enumerate(steps):
        for name, op, _, duration in step.nodes:
            total[name][index] += duration
            ops[name] = op
            if name in owners and node_role(op) != "control":
                per_gate[owners[name].gate][index] += duration
    begin = {name: (start - shown.start, duration) for name, _, start, duration in reversed(shown.nodes)}
    nodes = []
    for name, times in total.items():
        if name in begin:
            gate, decides = owners.get(name, (None, False))
            nodes.append(NodeTime(name, ops[name], gate, float(np.median(times)), *begin[name], decides))
    return NodeTimes(nodes, {gate: typical(times, passes) / 1e3 for gate, times in per_gate.items()})


@dataclass
class _Step:
    """One run of the model: begin and duration in microseconds, and its (name, op, start, duration)."""

    start: float
    duration: float
    nodes: list[tuple[str, str, float, float]]


def _steps(events: list[dict[str, Any]]) -> list[_Step]:
    runs = sorted((e for e in events if e["name"] == _RUN), key=lambda e: e["ts"])
    steps = [_Step(e["ts"], e["dur"], []) for e in runs]
    starts = np.array([step.start for step in steps])
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(_SUFFIX)]
    for e in sorted(kernels, key=lambda e: e["ts"]):
        step = steps[int(np.searchsorted(starts, e["ts"], side="right")) - 1]
        step.nodes.append((e["name"].removesuffix(_SUFFIX), e["args"]["op_name"], e["ts"], e["dur"]))
    return steps


def _median_step(steps: list[_Step]) -> _Step:
    return sorted(steps, key=lambda step: step.duration)[len(steps) // 2]


def gates_of_nodes(model: bytes, gates: Collection[str], fixed: Collection[str] = ()) -> dict[str, Owner]:
    """Return the owner of every node and of every value it makes, by name.

    What was traced in a module below the gate's own, other than `fixed`, takes the decision. What is there to
    choose tokens belongs to `tokens`, which is no module.

    Args:
        model: an ONNX file of ours; its nodes say which module they were traced from.
        gates: names of the gates, which are names of modules.
        fixed: modules below a gate's that are no part of it, see `child_scopes`.
    """
    found = {}
    for node in _nodes(onnx.load_model_from_string(model).graph):
        decides = next((entry.value for entry in node.metadata_props if entry.key == DECIDES), None)
        if decides is not None:
            found.update({name: Owner(decides, decides=True) for name in (node.name, *node.output) if name})
            continue
        scopes = _scopes(node)
        owners = [scope for scope in scopes if scope in gates]
        if owners and not any(scope in fixed for scope in scopes):
            owner = Owner(owners[-1], any(scope.startswith(f"{owners[-1]}.") for scope in scopes[:-1]))
            for name in (node.name, *node.output):
                if name:
                    found[name] = owner
    return found


def child_scopes(model: bytes, gates: Collection[str]) -> set[str]:
    """Return the modules below a gate's own that have nodes in `model`.

    In the dense artifact, which takes no decisions, these are work that no gate governs, such as the
    downsample of a residual block.
    """
    below = tuple(f"{gate}." for gate in gates)
    nodes = _nodes(onnx.load_model_from_string(model).graph)
    return {scope for node in nodes for scope in _scopes(node)[:-1] if scope.startswith(below)}


def _scopes(node: onnx.NodeProto) -> list[str]:
    """Return the modules a node was traced in, the outermost first, then its own name."""
    text = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
    try:
        return list(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return []


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _owners(model: onnx.ModelProto, gate_of: Mapping[str, Owner]) -> dict[str, Owner]:
    """Return the owner of every node that the runtime ran."""
    owners: dict[str, Owner] = {}
    readers: dict[str, str] = {}
    nodes = list(_nodes(model.graph))
    for node in nodes:
        names = (node.name, *node.output, node.name.removesuffix(_BLOCKED))
        gate = next((gate_of[name] for name in names if name in gate_of), None)
        if gate is not None:
            owners[node.name] = gate
        readers.update(dict.fromkeys(node.input, node.name))
    for node in nodes:  # a change of layout belongs to what needs it
        if node.op_type == "ReorderInput" and node.name not in owners:
            reader = readers.get(node.output[0], "")
            if reader in owners:
                owners[node.name] = owners[reader]
    return owners
