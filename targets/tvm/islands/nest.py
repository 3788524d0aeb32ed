"""A stage made ready for loops: flat addresses, constant conditions, as few and as long axes as possible."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise, product

from dvexport.targets.tvm.islands.expr import Expr, Linear, axis, const, fold, linear, loads, rebuild, substitute, walk
from dvexport.targets.tvm.islands.fuse import flat_index
from dvexport.targets.tvm.islands.stages import Stage, Tensor

__all__ = ["Nest", "nests"]

_MOST_SEGMENTS = 64


@dataclass(frozen=True)
class Nest:
    """A stage over a part of its domain.

    Attributes:
        stage: loads have one index, the offset in the tensor.
        place: offset of the point's result in the tensors that are stored.
    """

    stage: Stage
    place: Linear

    def factors(self, name: str) -> list[int | None]:
        """Return by how much each load's offset grows along an axis; None where that is not constant."""
        extents = self.stage.extents
        nodes = [node for expr in self.stage.expressions for node in walk(expr) if node.op == "load"]
        return [linear(node.args[0], extents).factor(name) for node in nodes]


def nests(stage: Stage, tensors: dict[str, Tensor]) -> list[Nest]:
    """Return a stage as nests that together cover its domain.

    The domain is cut where a condition of a branch changes, as in a concatenation or at the edge of a padded
    image, so that no loop contains a branch.
    """

    def flat(expr: Expr) -> Expr:
        def change(node: Expr) -> Expr | None:
            if node.op != "load":
                return None
            indices = [
                _kept_inside(*each) for each in zip(map(flat, node.args), tensors[node.value].shape, strict=True)
            ]
            inner = Expr("load", node.dtype, tuple(indices), node.value)
            return Expr("load", node.dtype, (flat_index(inner, tensors, stage.extents).expr(),), node.value)

        return rebuild(expr, change)

    strides = Tensor("int64", tuple(stage.axes.values())).strides
    place = Linear(tuple((axis(name), n) for name, n in zip(stage.axes, strides, strict=True)))
    whole = Nest(stage.mapped(flat), place)
    return [_merged(_without_unit_axes(part)) for part in _segments(whole)]


def _kept_inside(index: Expr, extent: int) -> Expr:
    """Return an index that stays on its axis, whatever the data hold that it is made of."""
    if not loads(index):
        return index
    limits = const(extent - 1, index.dtype), const(0, index.dtype)
    return Expr("Max", index.dtype, (Expr("Min", index.dtype, (index, limits[0])), limits[1]))


def _segments(nest: Nest) -> list[Nest]:
    stage = nest.stage
    cuts = {name: sorted({0, extent} | _changes(stage, name)) for name, extent in stage.axes.items()}
    intervals = [list(pairwise(cuts[name])) for name in stage.axes]
    boxes = list(product(*intervals))
    if not 1 < len(boxes) <= _MOST_SEGMENTS:
        return [nest]
    return [_restricted(nest, dict(zip(stage.axes, box, strict=True))) for box in boxes]


def _changes(stage: Stage, name: str) -> set[int]:
    """Return the positions on an axis at which a condition of this axis alone changes."""
    found: set[int] = set()
    branches = [node.args[0] for expr in stage.expressions for node in walk(expr) if node.op == "if"]
    for node in (each for branch in branches for each in walk(branch)):
        used = {each.value for each in walk(node) if each.op == "axis"}
        if node.op not in ("LT", "LE", "GT", "GE", "EQ", "NE") or used != {name}:
            continue
        decided = [_at(node, name, position) for position in range(stage.axes[name])]
        if all(each.op == "const" for each in decided):
            found |= {i for i in range(1, len(decided)) if decided[i].value != decided[i - 1].value}
    return found


def _at(condition: Expr, name: str, position: int) -> Expr:
    return fold(substitute(condition, {name: const(position)}), {})


def _restricted(nest: Nest, box: dict[str, tuple[int, int]]) -> Nest:
    axes = {name: stop - start for name, (start, stop) in box.items()}
    moved = {name: Linear(((axis(name), 1),), start).expr() for name, (start, _) in box.items()}
    stage = replace(nest.stage, axes=axes)
    stage = stage.mapped(lambda expr: fold(substitute(expr, moved), stage.extents))
    return Nest(stage, linear(substitute(nest.place.expr(), moved), stage.extents))


def _without_unit_axes(nest: Nest) -> Nest:
    stage = nest.stage
    zeros = {name: const(0) for name, extent in stage.extents.items() if extent == 1}
    smaller = replace(
        stage,
        axes={name: extent for name, extent in stage.axes.items() if extent > 1},
        reduced={name: extent for name, extent in stage.reduced.items() if extent > 1},
    )
    smaller = smaller.mapped(lambda expr: fold(substitute(expr, zeros), smaller.extents))
    return Nest(smaller, linear(substitute(nest.place.expr(), zeros), smaller.extents))


def _merged(nest: Nest) -> Nest:
    """Join neighbouring axes that every address runs through as if they were one."""
    for spatial in (True, False):
        *names, inner = (nest.stage.axes if spatial else nest.stage.reduced) or [""]
        for outer in reversed(names):
            if _are_one(nest, outer, inner):
                nest = _joined(nest, outer, inner, spatial)
            else:
                inner = outer
    return nest


def _are_one(nest: Nest, outer: str, inner: str) -> bool:
    extents = nest.stage.extents
    extent = extents[inner]
    forms = [nest.place]
    for expr in nest.stage.expressions:
        for node in _outside_of_loads(expr):
            if node.op == "axis" and node.value in (outer, inner):
                return False
            if node.op == "load":
                forms.append(linear(node.args[0], extents))
    for form in forms:
        fast, slow = form.factor(inner), form.factor(outer)
        if fast is None or slow is None or slow != fast * extent:
            return False
    return True


def _outside_of_loads(expr: Expr) -> list[Expr]:
    below = [] if expr.op == "load" else [node for argument in expr.args for node in _outside_of_loads(argument)]
    return [expr, *below]


def _joined(nest: Nest, outer: str, inner: str, spatial: bool) -> Nest:
    stage, zero = nest.stage, {outer: const(0)}
    long = stage.extents[outer] * stage.extents[inner]
    axes = dict(stage.axes if spatial else stage.reduced)
    del axes[outer]
    axes[inner] = long
    stage = replace(stage, axes=axes) if spatial else replace(stage, reduced=axes)
    stage = stage.mapped(lambda expr: fold(substitute(expr, zero), stage.extents))
    return Nest(stage, linear(substitute(nest.place.expr(), zero), stage.extents))
