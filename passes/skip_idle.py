"""Leave out, under a conditional, what only active tiles need.

A tile lowering works on lists of tiles (`dvexport.passes.tiles.lower_tiles`). An empty list costs no arithmetic, but
the operators that would have worked on it still run, some seventy for a gate. Their results reach the rest of the
graph only through `ScatterND`, and scattering nothing gives the base that it scatters into:

    ScatterND(base, indices, updates) = base          if the list behind `indices` is empty

So all of them go into the branch of an `If` that is taken when the list has an entry; the other branch returns the
bases. The list of what reuse owes is empty in most frames of a video, the list of a whole gate in those where
nothing moves. It pays where a conditional evaluates only the branch taken (`conditional = "lazy"` of a target).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir
import onnx_ir.passes.common as common

from dvexport.graph.graph import OPSET, Builder
from dvexport.graph.match import attributes_of, is_op, made_by

__all__ = ["SkipIdle"]

_AGAIN = ("Gather", "Relu")
"""Operators that both branches may hold: a base that one of them makes is made in the branch that uses it up."""


class SkipIdle(ir.passes.InPlacePass):
    """Put what depends on a `NonZero`, up to the scatters that end it, into a conditional.

    Requires: tile lowerings done, equal expressions shared. A list whose region does not end in scatters stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Wrap the smallest region first: what a gate owes lies inside what the gate computes."""
        lists = [node for node in model.graph if is_op(node, "NonZero")]
        sizes = {node: len(_dependents(_Uses(model.graph), node)[0]) for node in lists}
        modified = False
        for node in sorted(lists, key=lambda node: sizes[node]):
            region = _region(model.graph, node)
            if region is not None:
                _wrap(model.graph, region)
                modified = True
        if modified:
            common.TopologicalSortPass()(model)
        return ir.passes.PassResult(model, modified)


class _Uses:
    """Who reads what in the top graph; a node reads what its branches capture."""

    def __init__(self, graph: ir.Graph) -> None:
        self.order = {node: index for index, node in enumerate(graph)}
        self.reads = {node: list(_reads(node)) for node in graph}
        self.outputs = set(graph.outputs)
        self._readers: dict[ir.Value, list[ir.Node]] = {}
        for node, values in self.reads.items():
            for value in values:
                self._readers.setdefault(value, []).append(node)

    def readers(self, node: ir.Node) -> Iterator[ir.Node]:
        """Nodes that read an output of `node`."""
        for value in node.outputs:
            yield from self._readers.get(value, ())

    def producers(self, node: ir.Node) -> Iterator[ir.Node]:
        """Nodes of the top graph that make what `node` reads."""
        for value in self.reads[node]:
            producer = value.producer()
            if producer in self.order:
                yield producer  # type: ignore[misc]

    def reach(self, start: Iterable[ir.Node], *, forward: bool, within: set[ir.Node] | None = None) -> set[ir.Node]:
        """Return the nodes that `start` reaches, itself included, none outside `within`."""
        step = self.readers if forward else self.producers
        found: set[ir.Node] = set()
        waiting = list(start)
        while waiting:
            node = waiting.pop()
            if node not in found and (within is None or node in within):
                found.add(node)
                waiting += step(node)
        return found


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in node.inputs if value is not None)
    for inner in _inside(node):
        yield from (value for value in inner.inputs if value is not None)


def _inside(node: ir.Node) -> Iterator[ir.Node]:
    """Nodes in the branches of a node."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()


@dataclass
class _Region:
    """What to wrap: `nodes` in graph order, the list they depend on, and the scatters whose results leave."""

    entry: ir.Node
    nodes: list[ir.Node]
    scatters: list[ir.Node]
    leaving: list[ir.Node] = field(default_factory=list)


def _region(graph: ir.Graph, entry: ir.Node) -> _Region | None:
    """Return the region of a list, or None where an empty list would change more than scatters."""
    uses = _Uses(graph)
    dependent, scatters = _dependents(uses, entry)
    if not scatters or any(set(node.outputs) & uses.outputs for node in dependent):
        return None
    bases = [_base(scatter, set(scatters)) for scatter in scatters]
    makers = [base.producer() for base in bases]
    if any(maker in dependent for maker in makers):
        return None
    members = dependent | set(scatters)
    _absorb(uses, members, _kept_outside(uses, entry, makers))
    after = uses.reach((reader for node in members for reader in uses.readers(node) if reader not in members),
                       forward=True)  # fmt: skip
    if after & members:
        return None
    leaving = [s for s in scatters if s.outputs[0] in uses.outputs or not members.issuperset(uses.readers(s))]
    ordered = sorted(members, key=lambda node: uses.order[node])
    return _Region(entry, ordered, scatters, leaving) if leaving else None


def _dependents(uses: _Uses, entry: ir.Node) -> tuple[set[ir.Node], list[ir.Node]]:
    """Return what depends on a list, and the scatters that end the dependence because they scatter that list."""
    dependent: set[ir.Node] = set()
    scatters: dict[ir.Node, None] = {}
    waiting = list(uses.readers(entry))
    while waiting:
        node = waiting.pop()
        if node in dependent or node in scatters:
            continue
        if is_op(node, "ScatterND") and _lists(node.inputs[1], entry.outputs[0]):
            scatters[node] = None
        else:
            dependent.add(node)
            waiting += uses.readers(node)
    return dependent, sorted(scatters, key=lambda node: uses.order[node])


def _lists(indices: ir.Value | None, entries: ir.Value) -> bool:
    """Tell whether indices are empty when `entries` are: looked up by them, and viewed otherwise at most."""
    while indices is not None and indices is not entries:
        node = made_by(indices, "Gather", "Unsqueeze")
        if node is None:
            return False
        indices = node.inputs[1 if is_op(node, "Gather") else 0]
    return indices is entries


def _base(scatter: ir.Node, scatters: set[ir.Node]) -> ir.Value:
    """What a scatter's result is when its list, and those of the scatters before it, are empty."""
    base = scatter.inputs[0]
    assert base is not None
    maker = base.producer()
    return _base(maker, scatters) if maker in scatters else base  # type: ignore[arg-type]


def _kept_outside(uses: _Uses, entry: ir.Node, makers: list[ir.Node | None]) -> set[ir.Node]:
    """The list itself, and what makes the bases; of that, a cheap last step may be done in both branches."""
    kept = [entry]
    for maker in makers:
        if maker in uses.order:
            kept += uses.producers(maker) if is_op(maker, *_AGAIN) else [maker]  # type: ignore[union-attr,arg-type,list-item]
    return uses.reach(kept, forward=False)


def _absorb(uses: _Uses, members: set[ir.Node], kept: set[ir.Node]) -> None:
    """Add what only members read."""
    for node in sorted(uses.order, key=lambda node: -uses.order[node]):
        readers = list(uses.readers(node))
        private = readers and members.issuperset(readers) and not set(node.outputs) & uses.outputs
        if node not in members and node not in kept and private:
            members.add(node)


def _wrap(graph: ir.Graph, region: _Region) -> None:
    """Move a region into the branch of an `If` in its place."""
    leaving = [scatter.outputs[0] for scatter in region.leaving]
    build = Builder(metadata=region.leaving[-1].metadata_props)
    some = build.op("Cast", build.op("Size", region.entry.outputs[0]), to=ir.DataType.BOOL)
    otherwise = _otherwise(region)
    graph.insert_before(region.nodes[0], build.nodes)
    place = ir.Node("", "Identity", [some])  # holds the place while the region is taken out
    graph.insert_after(region.nodes[-1], [place])
    inside = {inner for node in region.nodes for inner in (node, *_inside(node))}
    choice = ir.Node("", "If", [some], num_outputs=len(leaving), metadata_props=dict(region.leaving[-1].metadata_props))
    for old, new in zip(leaving, choice.outputs, strict=True):
        _take_over(graph, old, new, inside)
    graph.remove(region.nodes)
    active = ir.Graph([], leaving, nodes=region.nodes, opset_imports={"": OPSET}, name="some")
    choice.attributes.add(ir.AttrGraph("then_branch", active))
    choice.attributes.add(ir.AttrGraph("else_branch", otherwise))
    graph.insert_before(place, [choice])
    graph.remove(place)


def _take_over(graph: ir.Graph, old: ir.Value, new: ir.Value, inside: set[ir.Node]) -> None:
    """Let all that lies outside read `new` in place of `old`, name included."""
    new.shape, new.type = old.shape, old.type
    for user, position in list(old.uses()):
        if user not in inside:
            user.replace_input_with(position, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new
    name, old.name = old.name, None
    new.name = name


def _otherwise(region: _Region) -> ir.Graph:
    """The branch of an empty list: every result is its base."""
    build = Builder(metadata=region.leaving[-1].metadata_props)
    members, scatters = set(region.nodes), set(region.scatters)
    outputs = []
    for scatter in region.leaving:
        base = _base(scatter, scatters)
        maker = base.producer()
        if maker in members:
            assert maker is not None
            again = attributes_of(maker)
            result = build.op(maker.op_type, *maker.inputs, domain=maker.domain, **again)
        else:
            result = build.op("Identity", base)
        result.shape, result.type = scatter.outputs[0].shape, scatter.outputs[0].type
        outputs.append(result)
    return ir.Graph([], outputs, nodes=build.nodes, opset_imports={"": OPSET}, name="none")
