"""Loop nests read from TIR: what is computed at every point of a domain, and where it goes.

A stage computes, for every point of its axes, some values, after reducing over its reduction axes if it has any, and
stores each at the point's place in a tensor of the axes' shape. That is all that legalised operators consist of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from dvexport.errors import UsageError
from dvexport.targets.tvm.islands.expr import Expr, axis, const, fold, load, loads, rebuild
from dvexport.targets.tvm.islands.relax import Program

__all__ = ["Accumulator", "Stage", "Tensor", "accumulated", "read_stages"]

_REDUCTION = 2
"""`IterVar` kind of a reduction axis."""

_ACCUMULATOR = "accumulator"


@dataclass(frozen=True)
class Tensor:
    """Element type and shape of a flat tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        """Elements from one position to the next, by axis."""
        return tuple(prod(self.shape[i + 1 :]) for i in range(len(self.shape)))


@dataclass(frozen=True)
class Accumulator:
    """A value that is reduced: starts as `init`, becomes `update` at every point; both speak of `accumulated(i)`."""

    init: Expr
    update: Expr


@dataclass(frozen=True)
class Stage:
    """A loop nest.

    Attributes:
        axes: extents of the axes, outermost first; every store is to a tensor of this shape.
        reduced: extents of the reduction axes.
        accumulators: what is reduced.
        stores: value by tensor; may speak of accumulators.
    """

    axes: dict[str, int]
    reduced: dict[str, int]
    accumulators: tuple[Accumulator, ...]
    stores: dict[str, Expr]
    name: str = ""

    @property
    def extents(self) -> dict[str, int]:
        """Extents of all axes."""
        return {**self.axes, **self.reduced}

    @property
    def points(self) -> int:
        """How often the innermost expression is evaluated."""
        return prod(self.extents.values())

    @property
    def operations(self) -> int:
        """Scalar operations, addresses left out, of the stage."""
        inner = sum(map(cost, (accumulator.update for accumulator in self.accumulators)))
        outer = sum(map(cost, self.stores.values()))
        return self.points * inner + prod(self.axes.values()) * outer

    @property
    def reads(self) -> list[str]:
        """Names of the tensors read, each once, in order."""
        return list(dict.fromkeys(node.value for expr in self.expressions for node in loads(expr)))

    @property
    def expressions(self) -> Iterator[Expr]:
        """Everything evaluated in it."""
        for accumulator in self.accumulators:
            yield from (accumulator.init, accumulator.update)
        yield from self.stores.values()

    def mapped(self, change: Any) -> Stage:
        """Return it with every expression replaced by `change(expression)`."""
        return replace(
            self,
            accumulators=tuple(Accumulator(change(each.init), change(each.update)) for each in self.accumulators),
            stores={name: change(value) for name, value in self.stores.items()},
        )


def accumulated(index: int, dtype: str) -> Expr:
    """Return the value of an accumulator so far."""
    return Expr(_ACCUMULATOR, dtype, (), index)


_CHEAP = {"const": 0, "axis": 0, "load": 1, _ACCUMULATOR: 0, "call": 8, "Div": 4}


def cost(expr: Expr) -> int:
    """Return about how many instructions an expression takes; addresses are free."""
    own = _CHEAP.get(expr.op, 1)
    return own if expr.op == "load" else own + sum(cost(argument) for argument in expr.args)


def read_stages(program: Program) -> tuple[list[Stage], dict[str, Tensor]]:
    """Return the stages of a program in order, and all its tensors.

    Raises:
        UsageError: a function has loops of another kind, such as a scatter or a sort.
    """
    tensors = {name: Tensor(dtype, shape) for name, (dtype, shape) in program.tensors.items()}
    scalars = {
        name: const(array.reshape(-1)[0].item(), str(array.dtype))
        for name, array in program.constants.items()
        if array.size == 1
    }
    stages: list[Stage] = []
    for number, call in enumerate(program.calls):
        stages += _Function(f"f{number}", call.func, call.tensors, tensors, scalars).stages()
    return stages, tensors


@dataclass
class _Function:
    """Reads one TIR function."""

    prefix: str
    func: Any
    arguments: list[str]
    tensors: dict[str, Tensor]
    scalars: dict[str, Expr]
    names: dict[Any, str] = field(default_factory=dict)
    bound: dict[Any, Expr] = field(default_factory=dict)

    def stages(self) -> list[Stage]:
        self.names.update(zip(self.func.params, self.arguments, strict=True))
        root = self.func.body.block
        for number, buffer in enumerate(root.alloc_buffers):
            name = f"{self.prefix}_{number}"
            self.names[buffer] = name
            self.tensors[name] = Tensor(str(buffer.dtype), tuple(int(size) for size in buffer.shape))
        return [self._stage(block) for block in _blocks(root.body)]

    def _stage(self, block: Any) -> Stage:
        axes: dict[str, int] = {}
        reduced: dict[str, int] = {}
        for number, each in enumerate(block.iter_vars):
            name = f"{'r' if each.iter_type == _REDUCTION else 'i'}{number}"
            self.bound[each.var] = axis(name)
            (reduced if each.iter_type == _REDUCTION else axes)[name] = int(each.dom.extent)
        if all(extent == 1 for extent in axes.values()) and not _stored(block.body)[0].indices:
            self.bound.update((each.var, const(0)) for each in block.iter_vars if each.iter_type != _REDUCTION)
            axes = {}  # a tensor without axes has loops that run once
        extents = {**axes, **reduced}
        written = self._stores(block.body, axes)
        values = {name: fold(value, extents) for name, value in written.items()}
        if block.init is None:
            if reduced or any(loads(value, name) for name, value in values.items()):
                raise self._unsupported("a loop that carries values")
            return Stage(axes, {}, (), values, self.prefix)
        inits = self._stores(block.init, axes)
        order = {name: i for i, name in enumerate(written)}

        def own(node: Expr) -> Expr | None:
            return accumulated(order[node.value], node.dtype) if node.op == "load" and node.value in order else None

        accumulators = tuple(Accumulator(inits[name], rebuild(values[name], own)) for name in order)
        stores = {name: accumulated(i, values[name].dtype) for name, i in order.items()}
        return Stage(axes, reduced, accumulators, stores, self.prefix)

    def _stores(self, body: Any, axes: dict[str, int]) -> dict[str, Expr]:
        found: dict[str, Expr] = {}
        for statement in getattr(body, "seq", [body]):
            kind = type(statement).__name__
            if kind == "Bind":
                self.bound[statement.var] = self._expr(statement.value)
            elif kind == "BufferStore":
                indices = [fold(self._expr(index), axes) for index in statement.indices]
                place = [fold(axis(name), axes) for name in axes]
                if indices != place:
                    raise self._unsupported("a store at a computed place")
                found[self.names[statement.buffer]] = self._expr(statement.value)
            else:
                raise self._unsupported(kind)
        return found

    def _expr(self, node: Any) -> Expr:
        kind = type(node).__name__
        if kind == "Var":
            return self.bound[node]
        dtype = str(node.ty.dtype)
        if kind in ("IntImm", "FloatImm"):
            return const(bool(node.value) if dtype == "bool" else node.value, dtype)
        if kind == "TensorLoad":
            name = self.names[node.source]
            if name in self.scalars:
                return self.scalars[name]
            return load(name, dtype, [self._expr(index) for index in node.indices])
        if kind == "Cast":
            return Expr("cast", dtype, (self._expr(node.value),))
        if kind == "Select":
            parts = (node.condition, node.true_value, node.false_value)
            return Expr("select", dtype, tuple(self._expr(part) for part in parts))
        if kind == "Not":
            return Expr("Not", dtype, (self._expr(node.a),))
        if kind == "Call":
            arguments = tuple(self._expr(argument) for argument in node.args)
            if node.op.name.endswith("if_then_else"):
                return Expr("if", dtype, arguments)
            return Expr("call", dtype, arguments, node.op.name)
        if hasattr(node, "a") and hasattr(node, "b"):
            return Expr(kind, dtype, (self._expr(node.a), self._expr(node.b)))
        raise self._unsupported(kind)

    def _unsupported(self, what: str) -> UsageError:
        return UsageError("a loop nest can't be scheduled for the device", where=self.prefix, why=what)


def _stored(body: Any) -> list[Any]:
    return [each for each in getattr(body, "seq", [body]) if hasattr(each, "indices")]


def _blocks(body: Any) -> Iterator[Any]:
    """Yield the innermost blocks of a function in order."""
    kind = type(body).__name__
    if kind == "SeqStmt":
        for statement in body.seq:
            yield from _blocks(statement)
    elif kind == "For":
        yield from _blocks(body.body)
    elif kind == "SBlockRealize":
        yield body.block
    else:
        raise UsageError("a loop nest can't be scheduled for the device", why=kind)
