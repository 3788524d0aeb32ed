"""The weights of Winograd's algorithm, in numpy: what `runtime/derive.c` makes when a plan is opened."""

from __future__ import annotations

import numpy as np

from dvexport.targets.tvm.kernels.conv.winograd_lists import row_floats
from dvexport.targets.tvm.kernels.conv.winograd_points import weight_matrix
from dvexport.targets.tvm.machine.dtype import F32, DType

__all__ = ["winograd_weights"]


def winograd_weights(weights: np.ndarray, m: int, dtype: DType = F32) -> np.ndarray:
    """Return the buffer `U`, `[cout, row_floats]` of `dtype`: for every point the weights of the input channels.

    Args:
        weights: `[cout, cin, 3, 3]`.
        m: edge of an output tile.
        dtype: the type of a weight; the transform is computed in float64.
    """
    cout, cin = weights.shape[:2]
    matrix = weight_matrix(m)
    points = np.einsum("pk,ockl,ql->opqc", matrix, weights.astype(np.float64), matrix)
    packed = np.zeros((cout, row_floats(m, cin, dtype)), dtype.array)
    packed[:, : points[0].size] = points.reshape(cout, -1)
    return packed
