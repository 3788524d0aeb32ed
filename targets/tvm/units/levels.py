"""When units and other nodes can run: their levels, and from these the islands and the order.

A *level* counts the units that have to be done before. A unit is a level above all that it reads; any other node is on
the highest level that it reads from, since an island of a level runs after that level's units. So the nodes that are
left over on a level need no unit of a higher one and may form one island: the fewest islands, with the most to fuse.

Within a level nodes have *turns*, because a profile tells the time of what chooses tokens apart. Such nodes have odd
turns, all others even ones, and no turn is before one that it reads from. Each turn of a level is an island.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from dvexport.graph.graph import DECIDES
from dvexport.graph.match import is_op
from dvexport.targets.tvm.units.unit import Unit

__all__ = ["Levels", "levels_of"]


@dataclass
class Levels:
    """Levels and turns of nodes.

    Attributes:
        level: the level of every node of a unit, and of all others but constants.
        turn: the turn within the level, for nodes that are in no unit.
        order: position in the graph.
    """

    level: dict[ir.Node, int] = field(default_factory=dict)
    turn: dict[ir.Node, int] = field(default_factory=dict)
    order: dict[ir.Node, int] = field(default_factory=dict)

    def islands(self) -> list[list[ir.Node]]:
        """Return the nodes that are in no unit, those of a level and turn together, in the order of these."""
        groups: dict[tuple[int, int], list[ir.Node]] = {}
        for node, turn in self.turn.items():
            groups.setdefault((self.level[node], turn), []).append(node)
        return [nodes for _, nodes in sorted(groups.items(), key=lambda item: item[0])]

    def in_order(self, units: Sequence[Unit], islands: Sequence[Unit]) -> Iterator[Unit]:
        """Yield units and islands in an order in which they can run: each level's islands after its units."""
        waiting = list(islands)
        for unit in sorted(units, key=lambda unit: (self.level[unit.last], self.order[unit.last])):
            while waiting and self.level[waiting[0].nodes[0]] < self.level[unit.last]:
                yield waiting.pop(0)
            yield unit
        yield from waiting


def levels_of(model: ir.Model, units: Sequence[Unit]) -> Levels:
    """Return the levels of a model's nodes.

    Args:
        model: cut into units.
        units: all of its units but islands; no node is in two.
    """
    unit_of = {node: unit for unit in units for node in unit.nodes}
    nodes = list(model.graph)
    found = Levels(order={node: index for index, node in enumerate(nodes)})
    for node in nodes:
        unit = unit_of.get(node)
        if unit is None:
            if not is_op(node, "Constant"):
                _place_node(found, node)
        elif node is unit.last:  # by then all that it reads has its level
            made_by = _producers(found, unit.nodes)
            found.level.update(dict.fromkeys(unit.nodes, 1 + max((found.level[p] for p in made_by), default=0)))
    return found


def _place_node(found: Levels, node: ir.Node) -> None:
    producers = _producers(found, [node])
    level = max((found.level[p] for p in producers), default=0)
    turn = max((found.turn[p] for p in producers if p in found.turn and found.level[p] == level), default=0)
    is_odd = DECIDES in node.metadata_props
    found.level[node], found.turn[node] = level, turn + (turn + is_odd) % 2


def _producers(found: Levels, nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Return the nodes, placed already, that make what some nodes read from outside."""
    made_by = [v.producer() for n in nodes for v in n.inputs if v is not None and v.const_value is None]
    return [p for p in made_by if p is not None and p not in nodes and p in found.level]
