"""Order a gate's channels so that those computed together lie together.

Permuting the output channels of a gated convolution, its bias, its decisions and the input channels of the
convolutions that read it, all alike, leaves the network's function as it is. From decisions seen in calibration,
channels are sorted by how often and with which others they are active. Those always computed come first and those
never computed last, each in groups of their own. So a conditional over a group (`lower_groups`) follows the decisions
closely.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from dvexport.decisions import ACTION
from dvexport.dialect.spec import specification
from dvexport.graph.graph import Builder, array_of, gate_name
from dvexport.passes.lowerings import lowering_of, takes_lowering

__all__ = [
    "ChannelStatistics",
    "GroupChannels",
    "even_groups",
    "group_order",
    "group_rate",
    "input_groups",
    "output_groups",
]

_OUTPUTS, _INPUTS = "dv.output_groups", "dv.input_groups"
"""Where a node's edges are kept: apart, because a convolution may read one gate and be another."""
_DEFAULT_GROUPS = 4
_SMALLEST = 16
"""Channels below which a convolution of its own is slower than its share of a larger one."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Actions of a gate seen in calibration, int `[frames, C]`."""

    actions: np.ndarray


def output_groups(node: ir.Node, channels: int) -> list[tuple[int, int]]:
    """Return the (first, last + 1) channels of each group of a node's outputs."""
    return _groups(node.metadata_props.get(_OUTPUTS), channels)


def input_groups(node: ir.Node, channels: int) -> list[tuple[int, int]]:
    """Return the (first, last + 1) channels of each group of the gate that a node reads."""
    return _groups(node.metadata_props.get(_INPUTS), channels)


def _groups(text: str | None, channels: int) -> list[tuple[int, int]]:
    edges = json.loads(text) if text else even_groups(0, channels)
    return list(pairwise(edges))


def group_order(actions: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Return a permutation of the channels and the edges of its groups.

    Args:
        actions: `[frames, C]` of 0, 1, 2.
    """
    active = actions != 0
    rate = active.mean(axis=0)
    always, never = rate == 1, rate == 0
    mixed = np.flatnonzero(~always & ~never)
    if len(mixed):
        # Along the leading direction of their joint activity, channels active together are near.
        centred = active[:, mixed] - rate[mixed]
        leading = np.linalg.svd(centred, full_matrices=False)[2][0] if len(active) > 1 else rate[mixed]
        mixed = mixed[np.lexsort((rate[mixed], leading))]
    order = np.concatenate([np.flatnonzero(always), mixed, np.flatnonzero(never)])
    first, last = int(always.sum()), int(always.sum()) + len(mixed)
    edges = sorted({0, first, last, len(order), *even_groups(first, last)})
    return order.astype(np.int64), _without_slivers(edges)


def group_rate(actions: np.ndarray) -> float:
    """Return the share of channels that lie, on a mean frame, in groups with any active channel."""
    order, edges = group_order(actions)
    active = (actions != 0)[:, order]
    work = sum((last - first) * active[:, first:last].any(axis=1).mean() for first, last in pairwise(edges))
    return float(work / len(order))


def even_groups(first: int, last: int) -> list[int]:
    """Return the edges of equal groups over a range of channels, none smaller than is worth it."""
    count = max(1, min(_DEFAULT_GROUPS, (last - first) // _SMALLEST))
    return [first + (last - first) * i // count for i in range(count + 1)]


def _without_slivers(edges: list[int]) -> list[int]:
    """Drop inner edges that leave a group too small to be worth a conditional."""
    kept = [edges[0]]
    for edge in edges[1:-1]:
        if edge - kept[-1] >= _SMALLEST and edges[-1] - edge >= _SMALLEST:
            kept.append(edge)
    return [*kept, edges[-1]]


class GroupChannels(ir.passes.InPlacePass):
    """Permute the channels of gates lowered as `groups` for which there are statistics.

    Requires: gate level, lowerings chosen. Probes keep the model's own order.
    """

    def __init__(self, statistics: Mapping[str, ChannelStatistics]) -> None:
        super().__init__()
        self.statistics = statistics

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Permute each gate's producer together with its consumers."""
        modified = False
        for node in list(model.graph):
            if not takes_lowering(node) or lowering_of(node) != "groups":
                continue
            operator = specification(node)
            seen = self.statistics.get(gate_name(node))
            readers = _private_readers(node.outputs[0])
            if seen is None or ACTION.name not in operator.decided(node) or readers is None:
                continue
            order, edges = group_order(seen.actions)
            _permute(node, readers, order, edges)
            modified = True
        return ir.passes.PassResult(model, modified)


def _private_readers(value: ir.Value) -> list[ir.Node] | None:
    """Return the gated nodes that read a value, or None if anything else does (a residual sum, an output)."""
    uses = list(value.uses())
    if value.is_graph_output() or any(not takes_lowering(user) for user, _ in uses):
        return None
    return [user for user, _ in uses]


def _permute(node: ir.Node, readers: list[ir.Node], order: np.ndarray, edges: list[int]) -> None:
    _reorder(node, specification(node).output_channels, order)
    node.metadata_props[_OUTPUTS] = json.dumps(edges)
    for reader in readers:
        _reorder(reader, specification(reader).input_channels, order)
        reader.metadata_props[_INPUTS] = json.dumps(edges)


def _reorder(node: ir.Node, axes: Mapping[str, int], order: np.ndarray) -> None:
    """Reorder those inputs of a node that have a value for each channel, along their axis."""
    operator, graph = specification(node), node.graph
    assert graph is not None
    build = Builder(metadata=node.metadata_props)
    for name, axis in axes.items():
        value, array = operator.bind(node)[name], array_of(operator.bind(node)[name])
        if value is None:
            continue
        if array is not None:
            moved = build.const(np.take(array, order, axis=axis))
        else:
            moved = build.op("Gather", value, build.const(order), axis=axis)
            moved.shape, moved.type = value.shape, value.type
        node.replace_input_with(operator.position(name), moved)
    graph.insert_before(node, build.nodes)
