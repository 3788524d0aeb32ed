"""Covering sets have every pair of values that the product has, and are much smaller."""

from __future__ import annotations

from itertools import product

import pytest
from covering import covering, every_pair, pairs_of
from oracle_check import cases, covering_cases

COLUMNS = [
    ([1, 2], [1, 2]),
    ([4, 8, 16], [1, 2, 3], ["a", "b", "c", "d"]),
    (range(8), range(3), range(3), range(2), range(2)),
    ([1], [2], [3]),
]


def every(rows) -> set:
    return set().union(*map(pairs_of, rows))


@pytest.mark.parametrize("columns", COLUMNS)
def test_every_pair_of_the_product_is_there(columns):
    rows = list(product(*columns))
    chosen = covering(rows)
    assert every(chosen) == every(rows)
    assert chosen == [row for row in rows if row in chosen]
    largest = sorted(len(column) for column in columns)[-2:]
    assert len(chosen) >= largest[0] * largest[1]
    assert len(columns) < 4 or len(chosen) < len(rows) / 8


def test_what_is_not_allowed_is_not_asked_for():
    rows = [row for row in product("abc", "xyz", "12") if row[:2] != ("a", "x")]
    chosen = covering(rows)
    assert set(chosen) <= set(rows)
    assert every(chosen) == every(rows)


def test_a_row_left_out_is_missed():
    """Or the tests above would hold of any set."""
    chosen = covering(product("abc", "xyz", "12"))
    assert every(chosen[1:]) != every(chosen)


def test_a_parametrized_test_has_every_pair():
    values = {"lanes": [4, 8, 16], "size, grid": [((1, 2), 3), ([4], 0), (5, False)], "kernel": [len, max]}
    names, rows = every_pair(values).args
    assert names == ["lanes", "size", "grid", "kernel"]
    found = [(repr(lanes), repr((size, grid)), repr(kernel)) for lanes, size, grid, kernel in rows]
    assert every(found) == every(product(*(map(repr, column) for column in values.values())))
    assert len(found) == 9


def test_cases_of_the_oracle_have_every_pair():
    chosen = [case.columns for case in covering_cases()]
    assert every(chosen) == every([case.columns for case in cases()])
    assert len(chosen) < len(cases()) / 2
