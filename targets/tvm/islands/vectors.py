"""Expressions written as TIR vectors: one instance computes `width` neighbouring points of an axis."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import tvm.tirx as tx
from tvm.ir import Call
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.islands.expr import Expr, Linear, const, linear
from dvexport.targets.tvm.islands.stages import Accumulator, Stage
from dvexport.targets.tvm.kernels.abi import i64
from dvexport.targets.tvm.kernels.math import FUNCTIONS
from dvexport.targets.tvm.machine.dtype import F32

__all__ = ["Vectors", "combined", "tail_lanes"]

_IDENTITY = {"Add": 0, "Mul": 1, "Max": None, "Min": None, "And": True, "Or": False}
"""Where partial results start; None: where the reduction starts, as a repetition changes nothing."""


def combined(accumulator: Accumulator) -> str | None:
    """Return the operator that combines partial results, None if the reduction can't be cut into parts."""
    update = accumulator.update
    if update.op not in _IDENTITY:
        return None
    sides = [_speaks_of_accumulator(side) for side in update.args]
    own = [side.op == "accumulator" for side in update.args]
    return update.op if any(own) and sum(sides) == 1 else None


def _speaks_of_accumulator(expr: Expr) -> bool:
    return expr.op == "accumulator" or any(map(_speaks_of_accumulator, expr.args))


def tail_lanes(skipped: int, width: int) -> Any:
    """Return the mask of the lanes from `skipped` on."""
    return tx.GE(
        tx.Ramp(tx.IntImm("int32", 0), tx.IntImm("int32", 1), width), _wide(tx.IntImm("int32", skipped), width)
    )


def _wide(value: Any, width: int) -> Any:
    return tx.Broadcast(value, width) if width > 1 else value


@dataclass
class Vectors:
    """Writes expressions at given positions.

    Attributes:
        buffers: TIR buffer by tensor.
        positions: TIR index by axis; that of the first lane for the axis `along`.
        extents: the extents of all axes.
        along: the axis that lanes run along.
        width: number of lanes.
        cells: the accumulators, of `width` elements each.
    """

    buffers: dict[str, Any]
    positions: dict[str, Any]
    extents: dict[str, int]
    along: str | None
    width: int
    cells: list[Any]
    guarded: bool = False
    """Whether what is written now may be a side of a branch that must not run: it can't be computed ahead."""

    def start(self, stage: Stage) -> None:
        """Set the accumulators to their first values."""
        for cell, each in zip(self.cells, stage.accumulators, strict=True):
            self._put(cell, self._all(each.init))

    def start_partial(self, stage: Stage) -> None:
        """Set the only accumulator to where partial results start."""
        (each,), (cell,) = stage.accumulators, self.cells
        identity = _IDENTITY[each.update.op]
        value = each.init if identity is None else const(identity, each.init.dtype)
        self._put(cell, replace(self, along=None)._all(value))

    def update(self, stage: Stage, lanes: Any = None) -> None:
        """Take in one more point; only in `lanes`, if a mask is given."""
        made = [self._all(each.update) for each in stage.accumulators]
        if lanes is not None:
            made = [tx.Select(lanes, value, self._read(cell)) for value, cell in zip(made, self.cells, strict=True)]
        if len(made) > 1:
            made = [T.bind(value) for value in made]
        for cell, value in zip(self.cells, made, strict=True):
            self._put(cell, value)

    def combined(self, stage: Stage) -> Vectors:
        """Combine partial results and return the writer of the one point they belong to."""
        (each,), (cell,) = stage.accumulators, self.cells
        operator, half = getattr(tx, each.update.op), self.width // 2
        while half:
            low, high = (self._read(cell, offset, half) for offset in (0, half))
            self._put(cell, operator(low, high), half)
            half //= 2
        one = replace(self, along=None, width=1)
        if _IDENTITY[each.update.op] is not None and each.init.value != _IDENTITY[each.update.op]:
            self._put(cell, operator(one._read(cell), one._all(each.init)), 1)
        return one

    def store(self, buffer: Any, place: Linear, value: Expr) -> None:
        """Store a value at an offset."""
        made = self._all(value)
        index = self._offset(place)
        made = tx.Cast("uint8" if self.width == 1 else f"uint8x{self.width}", made) if value.dtype == "bool" else made
        T.buffer_store(buffer, made, [index if self.width == 1 else tx.Ramp(index, i64(1), self.width)])

    def _put(self, cell: Any, value: Any, width: int = 0) -> None:
        width = width or self.width
        if str(cell.dtype) == "uint8":
            value = tx.Cast("uint8" if width == 1 else f"uint8x{width}", value)
        T.buffer_store(cell, value, [_lanes(0, width)])

    def _read(self, cell: Any, offset: int = 0, width: int = 0) -> Any:
        width = width or self.width
        return (
            _as_bool(cell[_lanes(offset, width)], width) if str(cell.dtype) == "uint8" else cell[_lanes(offset, width)]
        )

    def _all(self, expr: Expr) -> Any:
        value, wide = self._write(expr)
        return value if wide else _wide(value, self.width)

    def _write(self, expr: Expr) -> tuple[Any, bool]:
        """Return an expression's TIR, and whether it is a vector."""
        if expr.op == "const":
            return _constant(expr), False
        if expr.op == "axis":
            start = self.positions[expr.value]
            wide = expr.value == self.along
            return (tx.Ramp(start, i64(1), self.width), True) if wide else (start, False)
        if expr.op == "accumulator":
            return self._read(self.cells[expr.value]), self.width > 1
        if expr.op == "load":
            return self._load(expr)
        return self._operation(expr)

    def _keep(self, value: Any) -> Any:
        return value if self.guarded else T.bind(value)

    def _operation(self, expr: Expr) -> tuple[Any, bool]:
        before, self.guarded = self.guarded, self.guarded or expr.op == "if"
        written = [self._write(argument) for argument in expr.args]
        self.guarded = before
        wide = any(each for _, each in written)
        if expr.op == "if" and not written[0][1]:
            sides = [value if is_wide or not wide else _wide(value, self.width) for value, is_wide in written[1:]]
            return tx.if_then_else(written[0][0], *sides), wide
        arguments = [value if is_wide or not wide else _wide(value, self.width) for value, is_wide in written]
        dtype = f"{expr.dtype}x{self.width}" if wide else expr.dtype
        if expr.op == "cast":
            return _cast(dtype, expr.args[0].dtype, arguments[0], self.width if wide else 1), wide
        function = FUNCTIONS.get(expr.value.rpartition(".")[2]) if expr.op == "call" else None
        if function is not None and expr.dtype == F32.tvm:
            return function(self._keep(arguments[0]), self.width if wide else 1, self._keep), wide
        if expr.op == "call":
            return Call(expr.value, arguments, ret_ty=dtype), wide
        if expr.op in ("select", "if"):
            return tx.Select(*arguments), wide
        return getattr(tx, expr.op)(*arguments), wide

    def _load(self, expr: Expr) -> tuple[Any, bool]:
        buffer = self.buffers[expr.value]
        form = linear(expr.args[0], self.extents)
        step = 0 if self.along is None else form.factor(self.along)
        if step is None:
            index, wide = self._write(expr.args[0])
        elif step == 0:
            index, wide = self._offset(form), False
        elif step == 2 and expr.dtype == F32.tvm:
            return self._every_second(buffer, self._offset(form)), True
        else:
            index, wide = tx.Ramp(self._offset(form), i64(step), self.width), True
        value = buffer[index]
        return _as_bool(value, self.width if wide else 1) if expr.dtype == "bool" else value, wide

    def _every_second(self, buffer: Any, index: Any) -> Any:
        """Load elements 0, 2, 4, ... with two plain loads, of which the second ends with the last of them."""
        first, second = (buffer[tx.Ramp(start, i64(1), self.width)] for start in (index, index + i64(self.width - 1)))
        half = self.width // 2
        chosen = [2 * i for i in range(half)] + [self.width + 2 * i + 1 for i in range(half)]
        return tx.Shuffle([first, second], chosen)

    def _offset(self, form: Linear) -> Any:
        """Return a linear form's value at the first lane."""
        total = i64(form.base)
        for atom, factor in form.terms:
            value = self.positions[atom.value] if atom.op == "axis" else self._write(atom)[0]
            total = total + value * i64(factor)
        return total


def _lanes(offset: int, width: int) -> Any:
    return i64(offset) if width == 1 else tx.Ramp(i64(offset), i64(1), width)


def _as_bool(value: Any, width: int) -> Any:
    return tx.NE(value, _wide(tx.IntImm("uint8", 0), width))


def _constant(expr: Expr) -> Any:
    if expr.dtype.startswith("float"):
        return tx.FloatImm(expr.dtype, float(expr.value))
    return tx.IntImm(expr.dtype, int(expr.value))


def _cast(dtype: str, source: str, value: Any, width: int) -> Any:
    if dtype.startswith("bool") and source != "bool":
        return tx.NE(value, _wide(_constant(const(0, source)), width))
    return tx.Cast(dtype, value)
