"""GELU and exponentials in `f32`, inside of kernels whose registers are full of sums.

LLVM would keep the constants of such a function in registers over a whole kernel, and the sums of register blocks in
memory for that. So they are numbers in a thread's scratch, at a place that only `shape` knows: what may have
changed is loaded when it is wanted, right before a loop.
"""

from __future__ import annotations

from typing import Any

import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.abi import i64
from dvexport.targets.tvm.kernels.math import erf_parts
from dvexport.targets.tvm.kernels.vectors import constant, splat, store
from dvexport.targets.tvm.machine.dtype import F32, S32

__all__ = ["LOG2_E", "NUMBERS", "Numbers", "exp2_numbers", "gelu_numbers"]

NUMBERS = 32
"""Floats that a table of constants takes."""

LOG2_E = 1.44269504088896341
"""exp(x) = 2^(LOG2_E x)."""

_ROUND = 12582912.0
"""1.5 * 2^23: added to a small number, it leaves the nearest integer in the low bits."""
_EXP2_LIMIT = -87.0
"""Far below what a sum of weights can show, and far enough above the smallest normal numbers: sums over keys that are
masked out were subnormal, which made shifted windows many times slower."""
_EXP2 = (0.001327647129073739, 0.009675540961325169, 0.05550713092088699, 0.24022120237350464, 0.6931469440460205,
         1.0000001192092896)  # fmt: skip
"""2^x for |x| <= 1/2, highest power first: least greatest relative error, 7.5e-8 before rounding."""


class Numbers:
    """The constants of a function, in a buffer that the kernel writes.

    Args:
        buffer: a buffer of floats.
        place: where the table begins, by a value that LLVM can't know.
    """

    def __init__(self, buffer: Any, place: Any) -> None:
        self._buffer, self._place = buffer, place
        self._index: dict[float, int] = {}

    def write(self, values: list[float]) -> None:
        """Write the table; before anything else the kernel does."""
        for value in dict.fromkeys(values):
            self._index[value] = len(self._index)
            store(self._buffer, self._place + self._index[value], constant(value, F32), 1)
        assert len(self._index) <= NUMBERS

    def __call__(self, value: float, lanes: int) -> Any:
        """Return a constant in every lane."""
        return splat(self._buffer[self._place + i64(self._index[value])], lanes)

    def gelu(self, x: Any, lanes: int) -> Any:
        """Return x / 2 * (1 + erf(x / sqrt(2))), of a bound x."""
        low, above, below = erf_parts()
        half = T.bind(x * self(0.5, lanes))
        scaled = x * self(0.5**0.5, lanes)
        inside = T.bind(tx.Max(tx.Min(scaled, self(-low, lanes)), self(low, lanes)))
        square = T.bind(inside * inside)
        return half + half * (inside * self._polynomial(square, above, lanes) / self._polynomial(square, below, lanes))

    def exp2(self, x: Any, lanes: int) -> Any:
        """Return 2^x of x <= 0, within 3 units of the last place; 6e-27 where it is less."""
        int_type, float_type = S32.vector(lanes), F32.vector(lanes)
        inside = T.bind(tx.Max(x, self(_EXP2_LIMIT, lanes)))
        shifted = T.bind(inside + self(_ROUND, lanes))
        power = self._polynomial(T.bind(inside - (shifted - self(_ROUND, lanes))), _EXP2, lanes)
        # The integer is in the low bits of `shifted`: moved to where exponents are, it is added to that of the power.
        whole = tx.shift_left(tx.reinterpret(int_type, shifted), constant(23, S32, lanes))
        return tx.reinterpret(float_type, tx.reinterpret(int_type, power) + whole)

    def _polynomial(self, x: Any, factors: tuple[float, ...], lanes: int) -> Any:
        total = self(factors[0], lanes)
        for factor in factors[1:]:
            total = total * x + self(factor, lanes)
        return total


def gelu_numbers() -> list[float]:
    """Return the constants of `Numbers.gelu`."""
    low, above, below = erf_parts()
    return [0.5, 0.5**0.5, -low, low, *above, *below]


def exp2_numbers() -> list[float]:
    """Return the constants of `Numbers.exp2`."""
    return [_EXP2_LIMIT, _ROUND, *_EXP2]
