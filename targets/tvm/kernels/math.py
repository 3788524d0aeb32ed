"""Functions of the exponential kind in vectors, for `f32`: a C library computes them one by one, if it is there.

Each is within a few units of the last place of the exact result; NaN stays NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm.tirx as tx

from dvexport.targets.tvm.kernels.vectors import constant
from dvexport.targets.tvm.machine.dtype import F32, S32

__all__ = ["FUNCTIONS", "erf_parts"]

Bind = Callable[[Any], Any]
"""Keeps a value that is used several times."""

_LOG2_E = 1.44269504088896341
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP_LIMITS = -87.5, 89.0
"""exp is 0 and infinity in `f32` beyond them, denormal results left out."""
_ROUND = 12582912.0
"""1.5 * 2^23: added to a small number, it leaves the nearest integer in the low bits."""
_ROUND_BITS = 0x4B400000
_INFINITY_BITS = 0x7F800000
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""Cephes' expf: exp(r) = 1 + r + r² P(r) for |r| <= ln(2) / 2."""

_TANH_LIMIT = 7.90531110763549805
_TANH = (
    (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
     1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03),
    (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03),
)  # fmt: skip
_ERF_LIMIT = 4.0
_ERF = (
    (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
     -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
    (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
     -1.42647390514189e-02),
)  # fmt: skip
"""Eigen's fits: x P(x²) / Q(x²), highest power first."""


def _polynomial(x: Any, factors: Sequence[float], width: int) -> Any:
    total = constant(factors[0], F32, width)
    for factor in factors[1:]:
        total = total * x + constant(factor, F32, width)
    return total


def _clamp(x: Any, low: float, high: float, width: int) -> Any:
    return tx.Max(tx.Min(x, constant(high, F32, width)), constant(low, F32, width))


def _unless_nan(x: Any, result: Any, width: int) -> Any:
    """Return NaN where x is. The test is on the bits: TVM takes x != x for false."""
    bits = tx.bitwise_and(tx.reinterpret(S32.vector(width), x), constant(0x7FFFFFFF, S32, width))
    return tx.Select(tx.GT(bits, constant(_INFINITY_BITS, S32, width)), x, result)


def _exp(x: Any, width: int, bind: Bind) -> Any:
    int_type, float_type = S32.vector(width), F32.vector(width)
    inside = bind(_clamp(x, *_EXP_LIMITS, width))
    shifted = inside * constant(_LOG2_E, F32, width) + constant(_ROUND, F32, width)
    whole = bind(tx.reinterpret(int_type, shifted) - constant(_ROUND_BITS, S32, width))
    n = bind(tx.Cast(float_type, whole))
    r = bind(inside - n * constant(_LN2_HIGH, F32, width) - n * constant(_LN2_LOW, F32, width))
    power = _polynomial(r, _EXP, width) * (r * r) + r + constant(1.0, F32, width)
    exponent = (whole + constant(126, S32, width)) * constant(1 << 23, S32, width)  # the exponent of half the result
    scaled = power * tx.reinterpret(float_type, exponent) * constant(2.0, F32, width)
    vanishes = tx.LT(x, constant(_EXP_LIMITS[0], F32, width))
    return _unless_nan(x, tx.Select(vanishes, constant(0.0, F32, width), scaled), width)


def _sigmoid(x: Any, width: int, bind: Bind) -> Any:
    one = constant(1.0, F32, width)
    return one / (one + _exp(bind(constant(0.0, F32, width) - x), width, bind))


def _rational(limit: float, fit: tuple[Sequence[float], Sequence[float]]) -> Callable[[Any, int, Bind], Any]:
    def function(x: Any, width: int, bind: Bind) -> Any:
        inside = bind(_clamp(x, -limit, limit, width))
        square = bind(inside * inside)
        above, below = (_polynomial(square, factors, width) for factors in fit)
        return _unless_nan(x, inside * above / below, width)

    return function


FUNCTIONS: dict[str, Callable[[Any, int, Bind], Any]] = {
    "exp": _exp,
    "sigmoid": _sigmoid,
    "tanh": _rational(_TANH_LIMIT, _TANH),
    "erf": _rational(_ERF_LIMIT, _ERF),
}
"""By intrinsic: (`f32` value, lanes, how to keep a value) -> value."""


def erf_parts() -> tuple[float, tuple[float, ...], tuple[float, ...]]:
    """Return erf's lower limit, numerator and denominator: x P(x²) / Q(x²), highest power first."""
    return -_ERF_LIMIT, *_ERF
