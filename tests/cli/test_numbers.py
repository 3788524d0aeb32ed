"""The one check of numbers that C gets."""

from __future__ import annotations

import numpy as np
import pytest

from dvexport.errors import UsageError
from dvexport.numbers import INT_MAX, whole_number


@pytest.mark.parametrize("value", [1, 8, np.int64(3), np.uint8(8), np.array(2)])
def test_integers_of_python_and_numpy_become_ints(value):
    number = whole_number(value, "threads", least=1, most=8)
    assert type(number) is int
    assert number == value


def test_the_range_of_an_int_is_the_default():
    assert whole_number(INT_MAX, "n", least=0) == 2**31 - 1
    with pytest.raises(UsageError, match="from 0 to 2147483647, not 2147483648"):
        whole_number(INT_MAX + 1, "n", least=0)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "not 0"),
        (9, "not 9"),
        (-1, "not -1"),
        (2**32 + 2, "not 4294967298"),
        (-(2**63), "not -9223372036854775808"),
        pytest.param(10**5000, "not a number of 16610 bits", id="more digits than Python prints"),
        (True, "not True"),
        (np.True_, r"not (np\.)?True"),
        (2.0, r"not 2\.0"),
        (np.float32(2), r"not (np\.float32\()?2\.0"),
        (float("nan"), "not nan"),
        ("2", "not '2'"),
        ("x" * 100, r"not 'x{39}\.\.\.$"),
        (None, "not None"),
        ([2], r"not \[2\]"),
    ],
)
def test_all_else_is_refused_by_name_and_range(value, shown):
    with pytest.raises(UsageError, match=f"^threads must be a whole number from 1 to 8, {shown}"):
        whole_number(value, "threads", least=1, most=8)


def test_an_error_says_why_and_what_to_do():
    with pytest.raises(UsageError) as caught:
        whole_number(3, "n", least=0, most=2, why="there are two", hint="ask for fewer")
    assert (caught.value.why, caught.value.hint) == ("there are two", "ask for fewer")
