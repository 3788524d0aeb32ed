"""Cut a graph into units of work: what a hand-made kernel does, and islands of everything else.

Each kind of unit finds its own (`catalogue.py`), with the operators that it fuses. What no kernel of ours knows is
grouped: all such nodes that can run at the same moment form one island (`levels.py`), which Relax compiles
(`islands/island.py`). Units come out in an order in which they can run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Set

import onnx_ir as ir

from dvexport.targets.tvm.units.catalogue import ISLAND, MATCHED
from dvexport.targets.tvm.units.kinds import Kind
from dvexport.targets.tvm.units.levels import levels_of
from dvexport.targets.tvm.units.owners import gate_owners
from dvexport.targets.tvm.units.planes import images_of
from dvexport.targets.tvm.units.unit import Unit
from dvexport.targets.tvm.units.views import is_static

__all__ = ["cut", "find_units"]


def cut(model: ir.Model, gates: Collection[str] = ()) -> list[Unit]:
    """Return the units of a model, in an order in which they can run.

    Args:
        model: frames fixed, as the backend's passes leave it (`targets/tvm/passes.py`); not modified.
        gates: names of the gates, so that what a dense model does in their place is told apart.

    Raises:
        UsageError: a gated convolution that there is no kernel for.
    """
    units = find_units(model)
    levels = levels_of(model, units)
    islands = [Unit(ISLAND.name, nodes) for nodes in levels.islands()]
    owners = gate_owners(model, gates)
    read = {value for unit in units for value in unit.reads or ()}
    for unit in (*units, *islands):
        unit.set_edges(read)
        unit.gate = next((owners[node] for node in unit.nodes if node in owners), "")
    return list(levels.in_order(units, islands))


def find_units(model: ir.Model) -> list[Unit]:
    """Return the units that kernels of ours do, edges and gates not set; no node is in two."""
    images = images_of(model, MATCHED)
    order = {node: index for index, node in enumerate(model.graph)}
    units: list[Unit] = []
    taken: set[ir.Node] = set()
    for kind in MATCHED:
        for unit in _units_of(kind, [node for node in order if kind.starts_at(node)], images, taken):
            unit.grow()
            unit.nodes = sorted((set(unit.nodes) - taken), key=order.__getitem__)
            taken.update(unit.nodes)
            units.append(unit)
    return units


def _units_of(
    kind: Kind, nodes: Collection[ir.Node], images: Collection[ir.Value], taken: Set[ir.Node]
) -> Iterator[Unit]:
    """Yield the units of a kind that start at some nodes; the caller adds each one's nodes to `taken`."""
    for node in nodes:
        if node in taken or kind.match is None or (kind.flat and not _is_flat(node, images)):
            continue
        unit = kind.match(node, images)
        if unit is not None and not taken & set(unit.nodes) and _reads_flat(unit, images):
            yield unit


def _is_flat(node: ir.Node, images: Collection[ir.Value]) -> bool:
    """Tell whether no result of a node is an image and every shape is known, which inside of islands some are not."""
    if any(value in images for value in node.outputs):
        return False
    return all(is_static(value) for value in (*node.inputs, *node.outputs) if value is not None)


def _reads_flat(unit: Unit, images: Collection[ir.Value]) -> bool:
    """Tell whether nothing that a unit reads by strides is held as planes; inputs of the model lie flat."""
    return all(value not in images or value.is_graph_input() for value in unit.reads or ())
