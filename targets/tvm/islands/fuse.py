"""Fewer loops: values that are cheap to compute where they are used are never stored.

Three rewrites, over stages in order:
- *inline*: a stage without a reduction is substituted into its readers, if that does not repeat much work;
- *append*: a stage that reads the result of a reduction point by point becomes part of the reduction's loops;
- *alias*: a stage that copies a tensor element by element is another name for it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from math import prod

from dvexport.targets.tvm.islands.expr import Expr, Linear, axis, fold, linear, load, loads, rebuild, substitute, walk
from dvexport.targets.tvm.islands.stages import Stage, Tensor, cost
from dvexport.targets.tvm.islands.straight import straight

__all__ = ["Fused", "flat_index", "fuse"]

_REPEAT = 4
"""A cheap value (one or two operations) may be computed so many times instead of stored."""
_CHEAP_COST = 3


@dataclass
class Fused:
    """Stages that are left, and tensors that are other names: name -> the tensor it is."""

    stages: list[Stage]
    aliases: dict[str, str]


def fuse(stages: list[Stage], tensors: dict[str, Tensor], inputs: Collection[str], outputs: Collection[str]) -> Fused:
    """Return the stages rewritten.

    Args:
        tensors: shapes of all tensors that stages name.
        inputs: tensors given from outside.
        outputs: tensors that must exist afterwards, or be an alias of one that does.
    """
    pool = _Pool(list(stages), tensors, set(outputs))
    pool.drop_unread()
    pool.inline()
    pool.append()
    aliases = pool.alias(set(inputs))
    return Fused(pool.stages, aliases)


def flat_index(node: Expr, tensors: dict[str, Tensor], extents: dict[str, int]) -> Linear:
    """Return the offset of a load in its tensor's elements."""
    total = Linear()
    for index, stride in zip(node.args, tensors[node.value].strides, strict=True):
        total += linear(index, extents).times(stride)
    return straight(total, extents)


class _Pool:
    def __init__(self, stages: list[Stage], tensors: dict[str, Tensor], outputs: set[str]) -> None:
        self.stages, self.tensors, self.outputs = stages, tensors, outputs

    def drop_unread(self) -> None:
        """Remove stores that nobody reads, and stages without a store."""
        needed = set(self.outputs)
        kept = []
        for stage in reversed(self.stages):
            stores = {name: value for name, value in stage.stores.items() if name in needed}
            if stores:
                stage = replace(stage, stores=stores)
                needed.update(stage.reads)
                kept.append(stage)
        self.stages = kept[::-1]

    def inline(self) -> None:
        """Substitute producers into their readers, first to last."""
        position = 0
        while position < len(self.stages):
            stage = self.stages[position]
            (name, value), *more = stage.stores.items()
            readers = [other for other in self.stages[position + 1 :] if name in other.reads]
            fits = not stage.accumulators and not more
            if fits and (_is_move(value) or (name not in self.outputs and self._is_cheap_in(stage, value, readers))):
                self.stages = [self._inlined(stage, other) if other in readers else other for other in self.stages]
                if name not in self.outputs:
                    self.stages.remove(stage)
                    continue
            position += 1

    def _is_cheap_in(self, stage: Stage, value: Expr, readers: list[Stage]) -> bool:
        name = next(iter(stage.stores))
        size = prod(stage.axes.values())
        if _has_branch(value):  # a branch is decided per segment of the axes, so it must stay out of reductions
            return len(readers) == 1 and not readers[0].accumulators and readers[0].points <= size
        repeats = sum(_evaluations(reader, name) for reader in readers) / max(size, 1)
        return repeats <= 1 or (cost(value) <= _CHEAP_COST and repeats <= _REPEAT)

    def _inlined(self, producer: Stage, reader: Stage) -> Stage:
        (name, value), *_ = producer.stores.items()

        def change(expr: Expr) -> Expr:
            def at(node: Expr) -> Expr | None:
                if node.op != "load" or node.value != name:
                    return None
                indices = [rebuild(index, at) for index in node.args]
                return substitute(value, dict(zip(producer.axes, indices, strict=True)))

            return fold(rebuild(expr, at), reader.extents) if loads(expr, name) else expr

        return reader.mapped(change)

    def append(self) -> None:
        """Move stages into the reduction whose result they read."""
        position = 1
        while position < len(self.stages):
            stage = self.stages[position]
            target = None if stage.accumulators else self._reduction_of(stage, position)
            if target is None:
                position += 1
                continue
            joined = self._joined(self.stages[target], stage)
            if joined is None:
                position += 1
                continue
            self.stages[target] = joined
            del self.stages[position]
            self.drop_unread()
            position = target + 1

    def _reduction_of(self, stage: Stage, position: int) -> int | None:
        """Return the last producer of a stage, if that is a reduction."""
        made_at = [i for i in range(position) if any(name in stage.reads for name in self.stages[i].stores)]
        return made_at[-1] if made_at and self.stages[made_at[-1]].accumulators else None

    def _joined(self, reduction: Stage, stage: Stage) -> Stage | None:
        """Return the reduction with the stores of `stage` added, None if they don't go point by point."""
        if prod(reduction.axes.values()) != prod(stage.axes.values()):
            return None
        places = _same_place(stage.axes, reduction.axes)
        if places is None:
            return None
        here = _flat(reduction.axes)
        matches = True

        def own(node: Expr) -> Expr | None:
            nonlocal matches
            if node.op != "load" or node.value not in reduction.stores:
                return None
            matches &= set(flat_index(node, self.tensors, reduction.axes).terms) == set(here.terms)
            return reduction.stores[node.value]

        values = {}
        for name, value in stage.stores.items():
            moved = fold(substitute(value, places), reduction.axes)
            if _has_branch(moved):
                return None
            values[name] = rebuild(moved, own)
        return replace(reduction, stores={**reduction.stores, **values}) if matches else None

    def alias(self, inputs: set[str]) -> dict[str, str]:
        """Remove stages that copy an input, or a tensor that nobody outside knows, element by element."""
        aliases: dict[str, str] = {}
        named = inputs | {name for stage in self.stages for name in stage.stores if name not in self.outputs}
        for stage in list(self.stages):
            if stage.accumulators or len(stage.stores) != 1:
                continue
            (name, value), *_ = stage.stores.items()
            if value.op != "load" or value.value not in named or value.value in aliases.values():
                continue
            here, there = _flat(stage.axes), flat_index(value, self.tensors, stage.axes)
            if set(here.terms) == set(there.terms) and self.tensors[value.value].size == self.tensors[name].size:
                aliases[name] = value.value
                self.stages.remove(stage)
        return aliases


def _is_move(value: Expr) -> bool:
    """Whether a value is an element of a tensor, or known to the compiler: as cheap to read elsewhere as a copy."""
    known = all(node.op not in ("load", "axis", "call", "if") for node in walk(value))
    return known or (value.op == "load" and not any(loads(index) for index in value.args))


def _has_branch(value: Expr) -> bool:
    return any(node.op == "if" for node in walk(value))


def _evaluations(reader: Stage, name: str) -> int:
    """Return how often a reader evaluates its loads of a tensor."""
    inner = sum(len(loads(each.update, name)) for each in reader.accumulators)
    outer = sum(len(loads(value, name)) for value in reader.stores.values())
    return reader.points * inner + prod(reader.axes.values()) * outer


def _flat(axes: dict[str, int]) -> Linear:
    """Return a point's place in a tensor of the axes' shape."""
    tensor = Tensor("int64", tuple(axes.values()))
    return flat_index(load("", "int64", [axis(name) for name in axes]), {"": tensor}, axes)


def _same_place(axes: dict[str, int], others: dict[str, int]) -> dict[str, Expr] | None:
    """Return the position on each of `axes` of the point of `others` at the same place, if they differ in ones only."""
    long = [name for name, extent in axes.items() if extent > 1]
    other_long = [name for name, extent in others.items() if extent > 1]
    if [axes[name] for name in long] != [others[name] for name in other_long]:
        return None
    places: dict[str, Expr] = {name: Expr("const", "int64", (), 0) for name in axes}
    places.update({name: axis(other) for name, other in zip(long, other_long, strict=True)})
    return places
