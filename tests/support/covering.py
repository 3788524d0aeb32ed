"""Covering sets: few combinations of values that show every pair of values which the full product has.

A defect that needs two values at once is found as by the product. One that needs three may be missed, so values whose
meeting is the point of a test (a kernel's size and its algorithm, say) are one column.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any, TypeVar

import pytest

__all__ = ["covering", "every_pair", "pairs_of"]

T = TypeVar("T")
Pair = tuple[Hashable, ...]
"""Two columns and their values."""


def pairs_of(row: Sequence[Hashable]) -> set[Pair]:
    """Every pair of values in a row, each with its column."""
    return set(combinations(enumerate(row), 2))


def covering(rows: Iterable[T], columns: Callable[[T], Sequence[Hashable]] = tuple) -> list[T]:
    """Return some of `rows`, in their order, that together have every pair of values that all of them have.

    Greedy: each next row is the one with the most pairs that no row before it had, the earlier one of two alike.

    Args:
        rows: what is allowed, such as a product without what makes no sense.
        columns: the values of a row; the row itself, if it is a tuple.
    """
    every = list(rows)
    pairs = [pairs_of(columns(row)) for row in every]
    left, chosen = set().union(*pairs), []
    queue = [(-len(found), index) for index, found in enumerate(pairs)]
    heapq.heapify(queue)
    while left:
        gain, index = heapq.heappop(queue)
        fresh = len(pairs[index] & left)
        if fresh == -gain:
            chosen.append(index)
            left -= pairs[index]
        elif fresh:
            heapq.heappush(queue, (-fresh, index))  # worth less than when it was looked at
    return [every[index] for index in sorted(chosen)]


def every_pair(columns: Mapping[str, Iterable[Any]]) -> pytest.MarkDecorator:
    """Parametrize a test by a covering set of the product of `columns`.

    Args:
        columns: values by the parameter's name; by several names ("size, grid"), tuples of values that belong together.
    """
    lists = [list(values) for values in columns.values()]
    names = [name.split(", ") for name in columns]
    cases = []
    for places in covering(product(*(range(len(values)) for values in lists))):
        chosen = [values[i] for values, i in zip(lists, places, strict=True)]
        parts = [value if len(name) > 1 else (value,) for name, value in zip(names, chosen, strict=True)]
        cases.append([value for part in parts for value in part])
    return pytest.mark.parametrize([part for name in names for part in name], cases)
