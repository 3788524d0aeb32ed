"""Winograd's minimal filtering as matrices: Y = A^T [ (G g G^T) * (B^T d B) ] A.

F(m, 3) computes m x m outputs of a 3x3 convolution from (m+2) x (m+2) inputs with (m+2)^2
multiplications a channel pair instead of 9 m^2 (Lavin & Gray, 2016). As every transform is linear, a patch
flattened to a vector is transformed by one Kronecker product, and the products over channels are one
matrix product for each of the (m+2)^2 points.

The points 0, +-sqrt(1/2), +-sqrt(2), infinity keep F(4, 3) two to three times more
accurate than the usual 0, +-1, +-2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dvexport.passes.tiles.pixel_tables import even_tile

__all__ = ["WINOGRAD_STEPS", "transforms", "winograd_applies", "winograd_weight"]

WINOGRAD_STEPS = {"winograd4": 4, "winograd2": 2}
"""Lowering name to m of F(m x m, 3 x 3)."""

_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))}


def _vandermonde(points: tuple[float, ...], columns: int) -> np.ndarray:
    """Rows are powers of the points; the last row is the point at infinity."""
    rows = [[p**j for j in range(columns)] for p in points]
    return np.array([*rows, [0.0] * (columns - 1) + [1.0]])


def transforms(m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the 2-D transforms of F(m x m, 3 x 3), m = 2 or 4, in float64.

    Returns:
        input `[(m+2)^2, (m+2)^2]`, weight `[(m+2)^2, 9]`, output `[m^2, (m+2)^2]`.
    """
    points = _POINTS[m]
    inverse = np.linalg.inv(_vandermonde(points, m + 2)).T
    weight = _vandermonde(points, 3)
    output = _vandermonde(points, m).T
    return tuple(np.kron(a, a) for a in (inverse, weight, output))  # type: ignore[return-value]


def winograd_weight(weight: np.ndarray, m: int) -> np.ndarray:
    """Transform a weight `[Cout, Cin, 3, 3]` to `[(m+2)^2, Cin, Cout]`, float32."""
    flat = weight.reshape(*weight.shape[:2], 9).astype(np.float64)
    return np.einsum("pk,oik->pio", transforms(m)[1], flat).astype(np.float32)


def winograd_applies(
    kernel: tuple[int, int],
    attributes: Mapping[str, Any],
    size: tuple[int, int],
    grid: tuple[int, int],
    m: int,
) -> bool:
    """Tell whether F(m, 3) fits a convolution to an output plane and its tile grid."""
    tile = even_tile(size, grid)
    return (
        kernel == (3, 3)
        and tuple(attributes["strides"]) == (1, 1)
        and tuple(attributes["dilations"]) == (1, 1)
        and tuple(attributes["pads"]) == (1, 1, 1, 1)
        and tile is not None
        and tile[0] % m == 0
        and tile[1] % m == 0
    )
