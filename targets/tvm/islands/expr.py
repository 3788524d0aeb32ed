"""Scalar expressions of generic kernels, and the integer arithmetic that makes their addresses plain.

TVM's own expressions can't be rewritten from Python, so a function's body is read once into this small tree, rewritten
here, and written out as vectors by `loops.py`. An index becomes a *linear form*: a sum of axes times
constants. Divisions and remainders, which reshapes leave behind, vanish where the axes' extents allow it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Expr", "Linear", "axis", "const", "fold", "linear", "load", "loads", "rebuild", "substitute", "walk"]

Extents = Mapping[str, int]
"""Extent by axis: an axis runs from 0 to extent - 1."""


@dataclass(frozen=True)
class Expr:
    """A node: `op` on `args`.

    Attributes:
        op: `const`, `axis`, `load`, `cast`, `call`, `if` (evaluates one side only), `select`, or the name of a TIR
            operator, such as `Add`.
        dtype: its element type; booleans are `bool`.
        value: the constant, the axis' name, the tensor's name, or the intrinsic's.
    """

    op: str
    dtype: str
    args: tuple[Expr, ...] = ()
    value: Any = None


def const(value: Any, dtype: str = "int64") -> Expr:
    """Return a constant."""
    return Expr("const", dtype, (), value)


def axis(name: str) -> Expr:
    """Return an axis' position."""
    return Expr("axis", "int64", (), name)


def load(tensor: str, dtype: str, indices: Sequence[Expr]) -> Expr:
    """Return an element of a tensor."""
    return Expr("load", dtype, tuple(indices), tensor)


def walk(expr: Expr) -> Iterator[Expr]:
    """Yield an expression and all below it."""
    yield expr
    for argument in expr.args:
        yield from walk(argument)


def loads(expr: Expr, tensor: str | None = None) -> list[Expr]:
    """Return the loads in an expression, or those of one tensor."""
    return [node for node in walk(expr) if node.op == "load" and tensor in (None, node.value)]


def rebuild(expr: Expr, change: Callable[[Expr], Expr | None]) -> Expr:
    """Return an expression in which every node that `change` has an answer for is that answer."""
    found = change(expr)
    if found is not None:
        return found
    arguments = tuple(rebuild(argument, change) for argument in expr.args)
    return expr if arguments == expr.args else Expr(expr.op, expr.dtype, arguments, expr.value)


def substitute(expr: Expr, positions: Mapping[str, Expr]) -> Expr:
    """Return an expression with axes replaced."""
    return rebuild(expr, lambda node: positions.get(node.value) if node.op == "axis" else None)


@dataclass(frozen=True)
class Linear:
    """A sum of atoms times constants. An atom is an axis or what is not linear."""

    terms: tuple[tuple[Expr, int], ...] = ()
    base: int = 0

    def __add__(self, other: Linear) -> Linear:
        return _sum({**dict(self.terms)}, other.terms, 1, self.base + other.base)

    def __sub__(self, other: Linear) -> Linear:
        return _sum({**dict(self.terms)}, other.terms, -1, self.base - other.base)

    def times(self, factor: int) -> Linear:
        """Return it times a constant."""
        return Linear(tuple((atom, n * factor) for atom, n in self.terms if n * factor), self.base * factor)

    def factor(self, name: str) -> int | None:
        """Return the factor of an axis, None where the axis is in a term that is not linear."""
        found = 0
        for atom, n in self.terms:
            if atom.op == "axis" and atom.value == name:
                found = n
            elif any(node.op == "axis" and node.value == name for node in walk(atom)):
                return None
        return found

    def bounds(self, extents: Extents) -> tuple[int, int] | None:
        """Return its least and greatest value, None where they are not known."""
        low = high = self.base
        for atom, n in self.terms:
            if atom.op != "axis" or atom.value not in extents:
                return None
            reach = n * (extents[atom.value] - 1)
            low, high = low + min(reach, 0), high + max(reach, 0)
        return low, high

    def expr(self) -> Expr:
        """Return it as an expression."""
        total: Expr | None = None
        for atom, n in self.terms:
            term = atom if n == 1 else Expr("Mul", "int64", (atom, const(n)))
            total = term if total is None else Expr("Add", "int64", (total, term))
        if total is None:
            return const(self.base)
        return total if self.base == 0 else Expr("Add", "int64", (total, const(self.base)))


def _sum(terms: dict[Expr, int], more: Sequence[tuple[Expr, int]], sign: int, base: int) -> Linear:
    for atom, n in more:
        terms[atom] = terms.get(atom, 0) + sign * n
    return Linear(tuple((atom, n) for atom, n in terms.items() if n), base)


def linear(expr: Expr, extents: Extents) -> Linear:
    """Return an integer expression as a linear form."""
    if expr.op == "const":
        return Linear((), int(expr.value))
    if expr.op == "axis" and extents.get(expr.value) == 1:
        return Linear()
    if expr.op in ("Add", "Sub"):
        left, right = (linear(argument, extents) for argument in expr.args)
        return left + right if expr.op == "Add" else left - right
    if expr.op == "Mul":
        left, right = (linear(argument, extents) for argument in expr.args)
        if not right.terms or not left.terms:
            return left.times(right.base) if not right.terms else right.times(left.base)
    if expr.op in ("FloorDiv", "FloorMod"):
        found = _quotient(expr, extents)
        if found is not None:
            return found
    if expr.op in ("Min", "Max", "select"):
        found = _chosen(expr, extents)
        if found is not None:
            return found
    if expr.op == "cast" and expr.args[0].dtype == "int64":
        return linear(expr.args[0], extents)
    return Linear(((fold(expr, extents, inner=True), 1),))


def _quotient(expr: Expr, extents: Extents) -> Linear | None:
    """Divide: terms that are multiples of the divisor leave the remainder, if what is left can't carry over."""
    divisor = linear(expr.args[1], extents)
    if divisor.terms or divisor.base <= 0:
        return None
    by, whole = divisor.base, linear(expr.args[0], extents)
    multiples = Linear(tuple((atom, n // by) for atom, n in whole.terms if n % by == 0), whole.base // by)
    rest = Linear(tuple((atom, n) for atom, n in whole.terms if n % by), whole.base % by)
    bounds = rest.bounds(extents)
    if bounds is None or bounds[0] < 0 or bounds[1] >= by:
        return None
    return multiples if expr.op == "FloorDiv" else rest


def _chosen(expr: Expr, extents: Extents) -> Linear | None:
    """Decide a minimum, a maximum or a choice whose outcome the extents tell."""
    if expr.op == "select":
        condition = fold(expr.args[0], extents)
        return linear(expr.args[1 if condition.value else 2], extents) if condition.op == "const" else None
    left, right = (linear(argument, extents) for argument in expr.args)
    bounds = (left - right).bounds(extents)
    if bounds is None or bounds[0] < 0 < bounds[1]:
        return None
    left_is_less = bounds[1] <= 0
    return left if left_is_less == (expr.op == "Min") else right


def fold(expr: Expr, extents: Extents, *, inner: bool = False) -> Expr:
    """Return an expression with indices in linear form and with every decision taken that the extents tell.

    Args:
        inner: leave the node itself and simplify what is below it.
    """
    if expr.op in ("const", "axis"):
        return expr
    if expr.dtype == "int64" and not inner and expr.op not in ("load", "call", "if"):
        return linear(expr, extents).expr()
    arguments = tuple(fold(argument, extents) for argument in expr.args)
    made = Expr(expr.op, expr.dtype, arguments, expr.value)
    decided = _decide(made, extents)
    return made if decided is None else decided


_COMPUTED: dict[str, Callable[..., bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
    "Not": operator.not_,
}


def _computed(expr: Expr, known: list[Any]) -> Expr | None:
    """Compute what tests of constants give, as in the limits of a Clip; arithmetic is left to the compiler."""
    if expr.op in _COMPUTED:
        return const(_COMPUTED[expr.op](*known), "bool")
    if expr.op == "call" and expr.value.endswith(".isnan"):
        return const(known[0] != known[0], "bool")
    if expr.op == "cast" and expr.args[0].dtype == "bool":
        return const(int(known[0]), expr.dtype)
    return None


def _chosen_side(expr: Expr) -> Expr | None:
    if expr.op in ("if", "select") and expr.args[0].op == "const":
        return expr.args[1 if expr.args[0].value else 2]
    return None


_COMPARISONS: dict[str, Callable[[int, int], bool | None]] = {
    # each reads the bounds of left - right
    "LT": lambda low, high: True if high < 0 else False if low >= 0 else None,
    "LE": lambda low, high: True if high <= 0 else False if low > 0 else None,
    "GT": lambda low, high: True if low > 0 else False if high <= 0 else None,
    "GE": lambda low, high: True if low >= 0 else False if high < 0 else None,
    "EQ": lambda low, high: True if low == high == 0 else False if low > 0 or high < 0 else None,
    "NE": lambda low, high: False if low == high == 0 else True if low > 0 or high < 0 else None,
}


def _decide(expr: Expr, extents: Extents) -> Expr | None:
    known = [argument.value for argument in expr.args if argument.op == "const"]
    computed = _computed(expr, known) if known and len(known) == len(expr.args) else None
    if computed is not None:
        return computed
    side = _chosen_side(expr)
    if side is not None:
        return side
    if expr.op in _COMPARISONS and expr.args[0].dtype in ("int32", "int64"):
        bounds = (linear(expr.args[0], extents) - linear(expr.args[1], extents)).bounds(extents)
        outcome = None if bounds is None else _COMPARISONS[expr.op](*bounds)
        return None if outcome is None else const(outcome, "bool")
    if expr.op in ("And", "Or"):
        decisive = expr.op == "Or"  # True decides a disjunction, False a conjunction
        for one, other in (expr.args, expr.args[::-1]):
            if one.op == "const":
                return one if bool(one.value) == decisive else other
    if expr.op == "Not" and expr.args[0].op == "const":
        return const(not expr.args[0].value, "bool")
    return None
