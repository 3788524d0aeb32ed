"""Loops and vectors of a nest, written as TIR with the calling convention of `kernels/abi.py`.

The vectors run along the last axis, where results are contiguous; or, where a reduction reads memory in
order, along the reduction, with partial sums that are added up at the end. A last vector that would overshoot
starts earlier and computes some points twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from typing import Any

import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.islands.expr import Expr
from dvexport.targets.tvm.islands.nest import Nest
from dvexport.targets.tvm.islands.stages import Stage
from dvexport.targets.tvm.islands.vectors import Vectors, combined, tail_lanes
from dvexport.targets.tvm.kernels.abi import i64, share
from dvexport.targets.tvm.machine.machine import Machine

__all__ = ["write_nest"]

_MOST_ROWS, _MOST_VECTORS = 8, 4
"""The most rows and vectors in a block of results that are accumulated together."""
_SMALLEST_VECTOR = 4
_ENOUGH_SHARES = 16
"""Outer loops are joined until there are so many iterations to share between threads."""


def write_nest(nest: Nest, buffers: dict[str, Any], machine: Machine, threads: tuple[Any, Any] | None) -> None:
    """Write the loops of a nest inside an open kernel.

    Args:
        buffers: TIR buffer by tensor; of 1-byte elements for booleans.
        machine: its vectors, and the registers that accumulators may fill.
        threads: which share, of how many; None: everything.
    """
    lanes, registers = machine.lanes, machine.block[0] * machine.block[1]
    along = _vector_axis(nest)
    if along is None:
        _Scalar(nest, buffers, 1, registers, threads).write()
    elif along in nest.stage.axes:
        _Spatial(nest, buffers, _width(nest.stage.axes[along], lanes), registers, threads).write()
    else:
        _Partial(nest, buffers, _width(nest.stage.reduced[along], lanes), registers, threads, along=along).write()


def _width(extent: int, lanes: int) -> int:
    """Return the longest vector of a power of two that fits an axis."""
    return min(lanes, 1 << (extent.bit_length() - 1))


def _vector_axis(nest: Nest) -> str | None:
    """Return the axis that vectors run along.

    Best are contiguous results from contiguous reads, then a reduction that reads in order, then gathered reads.
    """
    stage = nest.stage
    last = next(reversed(stage.axes), "")
    spatial = stage.axes.get(last, 1) >= _SMALLEST_VECTOR and nest.place.factor(last) == 1
    spatial = spatial and not _branches_on(stage, last)
    if spatial and all(factor in (0, 1) for factor in nest.factors(last)):
        return last
    for name in reversed(stage.reduced):
        contiguous = all(factor in (0, 1) for factor in nest.factors(name))
        if contiguous and stage.reduced[name] >= _SMALLEST_VECTOR and _adds_up(stage) and not _branches_on(stage, name):
            return name
    return last if spatial else None


def _branches_on(stage: Stage, name: str) -> bool:
    """Whether a branch's condition depends on an axis: its sides can't be evaluated both."""
    conditions = [node.args[0] for expr in stage.expressions for node in _nodes(expr) if node.op == "if"]
    return any(node.op == "axis" and node.value == name for each in conditions for node in _nodes(each))


def _nodes(expr: Expr) -> list[Expr]:
    return [expr, *(node for argument in expr.args for node in _nodes(argument))]


def _adds_up(stage: Stage) -> bool:
    """Whether partial results can be combined: one accumulator, and an operator that is associative."""
    return len(stage.accumulators) == 1 and combined(stage.accumulators[0]) is not None


@dataclass
class _Loops:
    """What the kinds of nest share: outer loops, split between threads."""

    nest: Nest
    buffers: dict[str, Any]
    width: int
    registers: int
    threads: tuple[Any, Any] | None
    positions: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        return self.nest.stage

    def outer(self, loops: Sequence[tuple[str, int]], stack: ExitStack) -> None:
        """Open loops, the first of them shared between threads; positions are set by name."""
        shared = 0
        while self.threads is not None and shared < len(loops):
            shared += 1
            if prod(extent for _, extent in loops[:shared]) >= _ENOUGH_SHARES:
                break
        if shared:
            assert self.threads is not None
            count = prod(extent for _, extent in loops[:shared])
            start, stop = share(tx.IntImm("int32", count), *self.threads)
            rest = T.bind(stack.enter_context(T.serial(start, stop)))
            for name, extent in reversed(loops[1:shared]):  # 32 bits: small cores divide 64 in a library
                self.positions[name] = T.bind(i64(tx.truncmod(rest, tx.IntImm("int32", extent))))
                rest = T.bind(tx.truncdiv(rest, tx.IntImm("int32", extent)))
            self.positions[loops[0][0]] = T.bind(i64(rest))
        for name, extent in loops[shared:]:
            self.positions[name] = stack.enter_context(T.serial(i64(0), i64(extent)))

    def reduction(self, names: Sequence[str], stack: ExitStack) -> None:
        """Open the loops of reduction axes."""
        for name in names:
            extent = i64(self.stage.reduced[name])
            self.positions[name] = stack.enter_context(T.serial(i64(0), extent))

    def block(self, candidates: Sequence[str]) -> tuple[str, int]:
        """Return an axis and how many of its positions are computed together, to hide latency and reuse loads."""
        best = "", 1
        for name in candidates:
            extent = self.stage.axes[name]
            size = max(d for d in range(1, min(_MOST_ROWS, self.registers) + 1) if extent % d == 0)
            if size > best[1]:
                best = name, size
        return best

    def member(self, positions: dict[str, Any], along: str) -> Vectors:
        """Return a writer at some positions, with accumulators of its own."""
        cells = [_cell(each.init.dtype, self.width) for each in self.stage.accumulators]
        return Vectors(self.buffers, {**self.positions, **positions}, self.stage.extents, along, self.width, cells)

    def store(self, vectors: Vectors) -> None:
        for name, value in self.stage.stores.items():
            vectors.store(self.buffers[name], self.nest.place, value)


class _Scalar(_Loops):
    """One point at a time."""

    def write(self) -> None:
        with ExitStack() as stack:
            self.outer(list(self.stage.axes.items()), stack)
            accumulators = [_cell(each.init.dtype, 1) for each in self.stage.accumulators]
            vectors = Vectors(self.buffers, self.positions, self.stage.extents, None, 1, accumulators)
            if accumulators:
                vectors.start(self.stage)
                with ExitStack() as inner:
                    self.reduction(list(self.stage.reduced), inner)
                    vectors.update(self.stage)
            self.store(vectors)


class _Spatial(_Loops):
    """Vectors along the last axis, several of them together where there is a reduction."""

    def write(self) -> None:
        axes = dict(self.stage.axes)
        along, extent = axes.popitem()
        count = -(-extent // self.width)
        block, size = self.block([name for name in axes if self._reuses(name)]) if self.stage.accumulators else ("", 1)
        together = min(count, _MOST_VECTORS, max(1, self.registers // size)) if self.stage.accumulators else 1
        loops = [(name, n // size if name == block else n) for name, n in axes.items()]
        with ExitStack() as stack:
            self.outer([*loops, ("vector", -(-count // together))], stack)
            starts = self._starts(self.positions["vector"] * i64(together), together, extent)
            rows = [{block: T.bind(self.positions[block] * i64(size) + i64(i))} if block else {} for i in range(size)]
            self._write([self.member({**row, along: start}, along) for row in rows for start in starts])

    def _reuses(self, name: str) -> bool:
        return any(factor == 0 for factor in self.nest.factors(name)) or self.stage.axes[name] <= _MOST_ROWS

    def _starts(self, first: Any, count: int, extent: int) -> list[Any]:
        """Return where vectors begin: none reaches beyond the axis."""
        begins = [(first + i64(i)) * i64(self.width) for i in range(count)]
        if extent % (self.width * count):
            begins = [tx.min(begin, i64(extent - self.width)) for begin in begins]
        return [T.bind(begin) for begin in begins]

    def _write(self, members: list[Vectors]) -> None:
        if self.stage.accumulators:
            for member in members:
                member.start(self.stage)
            with ExitStack() as inner:
                self.reduction(list(self.stage.reduced), inner)
                for member in members:
                    member.positions.update({name: self.positions[name] for name in self.stage.reduced})
                    member.update(self.stage)
        for member in members:
            self.store(member)


@dataclass
class _Partial(_Loops):
    """Vectors along a reduction axis: partial results, combined at the end."""

    along: str = ""

    def write(self) -> None:
        stage, extent = self.stage, self.stage.reduced[self.along]
        block, size = self.block([name for name in stage.axes if 0 in self.nest.factors(name)])
        with ExitStack() as stack:
            self.outer([(name, n // size if name == block else n) for name, n in stage.axes.items()], stack)
            rows = [{block: T.bind(self.positions[block] * i64(size) + i64(i))} if block else {} for i in range(size)]
            members = [self.member(row, self.along) for row in rows]
            for member in members:
                member.start_partial(stage)
            with ExitStack() as inner:
                self.reduction([name for name in stage.reduced if name != self.along], inner)
                self._sweep(members, extent)
            for member in members:
                self.store(member.combined(stage))

    def _sweep(self, members: list[Vectors], extent: int) -> None:
        whole = extent // self.width
        outer = {name: self.positions[name] for name in self.stage.reduced if name != self.along}
        with T.serial(i64(0), i64(whole)) as vector:
            for member in members:
                member.positions.update(outer)
                member.positions[self.along] = T.bind(vector * self.width)
                member.update(self.stage)
        if extent % self.width:
            for member in members:
                member.positions[self.along] = i64(extent - self.width)
                member.update(self.stage, tail_lanes(self.width - extent % self.width, self.width))


def _cell(dtype: str, width: int) -> Any:
    return T.alloc_buffer((width,), dtype if dtype != "bool" else "uint8", scope="global")
