"""Indices that are linear although they don't look it.

A reshape leaves quotients and remainders whose sum is linear: 6 * ((4 i + j) // 6) + (4 i + j) % 6. Instead
of knowing all identities, the index is evaluated at every point: extents are small numbers at export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np

from dvexport.targets.tvm.islands.expr import Expr, Linear, axis, walk

__all__ = ["straight"]

_MOST_POINTS = 1 << 20

_NUMPY: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "FloorDiv": np.floor_divide,
    "FloorMod": np.mod,
    "Min": np.minimum,
    "Max": np.maximum,
    "select": np.where,
    "if": np.where,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
    "And": np.logical_and,
    "Or": np.logical_or,
    "Not": np.logical_not,
}


def straight(form: Linear, extents: Mapping[str, int]) -> Linear:
    """Return a sum of axes that equals `form` at every point, or `form` itself if there is none."""
    bent = [node for atom, _ in form.terms if atom.op != "axis" for node in walk(atom)]
    if not bent or any(node.op not in _NUMPY and node.op not in ("axis", "const") for node in bent):
        return form
    names = sorted({node.value for atom, _ in form.terms for node in walk(atom) if node.op == "axis"})
    sizes = [extents[name] for name in names]
    if prod(sizes) > _MOST_POINTS:
        return form
    grid = dict(zip(names, np.indices(sizes, sparse=True), strict=True))
    values = np.broadcast_to(_evaluate(form.expr(), grid), sizes)
    base = int(values[(0,) * len(sizes)])
    steps = [int(values[tuple(int(i == j) for j in range(len(names)))]) - base for i in range(len(names))]
    guess = base + sum(step * grid[name] for step, name in zip(steps, names, strict=True))
    if not np.array_equal(values, np.broadcast_to(guess, sizes)):
        return form
    return Linear(tuple((axis(name), step) for name, step in zip(names, steps, strict=True) if step), base)


def _evaluate(expr: Expr, grid: Mapping[str, np.ndarray]) -> Any:
    if expr.op == "axis":
        return grid[expr.value]
    if expr.op == "const":
        return expr.value
    return _NUMPY[expr.op](*(_evaluate(argument, grid) for argument in expr.args))
