"""Whole numbers as users give them, checked before they are handed to C, which would cut them off in silence."""

from __future__ import annotations

import operator
from contextlib import suppress
from typing import SupportsIndex, cast

from dvexport.errors import UsageError

__all__ = ["INT_MAX", "MOST_RUNS", "whole_number"]

INT_MAX = 2**31 - 1

MOST_RUNS = 10_000
"""Passes of a profile over its clip: every call of every pass is kept until the end."""
"""The largest C `int` of every target."""

_SHOWN = 40
"""Characters of a wrong value that an error quotes."""


def whole_number(
    value: object, what: str, *, least: int, most: int = INT_MAX, why: str | None = None, hint: str | None = None
) -> int:
    """Return `value`, an integer of Python or NumPy, as an int.

    Args:
        value: what was given.
        what: its name, for the error.
        least, most: the range, both ends included; within that of the C type it becomes.
        why: what sets the range.
        hint: what to do about it.

    Raises:
        UsageError: it is no integer (a bool, a float and a text are none), or outside the range, which is named.
    """
    number = None
    if not isinstance(value, bool) and getattr(getattr(value, "dtype", None), "kind", "") != "b":
        with suppress(TypeError):
            number = operator.index(cast(SupportsIndex, value))
    if number is not None and least <= number <= most:
        return number
    raise UsageError(f"{what} must be a whole number from {least} to {most}, not {_shown(value, number)}", why=why,
                     hint=hint)  # fmt: skip


def _shown(value: object, number: int | None) -> str:
    """Quote a value; one of thousands of digits, which Python does not print, by its size."""
    if number is not None and number.bit_length() > 64:
        return f"a number of {number.bit_length()} bits"
    text = repr(value) if number is None else str(number)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
