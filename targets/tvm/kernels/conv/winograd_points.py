"""The algebra of Winograd's minimal filtering F(m x m, 3 x 3), for m = 2 and 4 (Lavin and Gray, arXiv:1509.09308).

A tile of m x m outputs is Y = A' [(G w G') * (B' x B)] A, with a tile x of (m + 2) x (m + 2) inputs and `*` element
by element, so for every one of the (m + 2)^2 *points* a convolution is a matrix product over channels.

A, B and G interpolate polynomials at 0, +-a, +-b and infinity. For m = 4, a = sqrt(1/2) and b = sqrt(2) have a
quarter of the rounding error of the usual 1 and 2, and cost the same: a b = 1, so the constants stay few.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.polynomial import polynomial

__all__ = ["FAR", "NEAR", "interpolation", "weight_matrix"]

NEAR, FAR = math.sqrt(0.5), math.sqrt(2.0)

_FINITE = {2: (0.0, 1.0, -1.0), 4: (0.0, NEAR, -NEAR, FAR, -FAR)}
"""Interpolation points; the last one, infinity, goes without saying."""


def interpolation(m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return A' `[m, m + 2]`, G `[m + 2, 3]` and B' `[m + 2, m + 2]` in float64."""
    points, n = _FINITE[m], m + 2
    a, g, b = np.zeros((m, n)), np.zeros((n, 3)), np.zeros((n, n))
    for i, point in enumerate(points):
        others = [other for other in points if other != point]
        a[:, i] = [point**k for k in range(m)]
        g[i] = np.array([point**k for k in range(3)]) / math.prod(point - other for other in others)
        b[i, : n - 1] = polynomial.polyfromroots(others)
    a[m - 1, n - 1] = g[n - 1, 2] = 1.0
    b[n - 1] = polynomial.polyfromroots(points)
    return a, g, b


def weight_matrix(m: int) -> np.ndarray:
    """Return G `[m + 2, 3]`."""
    return interpolation(m)[1]
