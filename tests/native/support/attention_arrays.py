"""What the tests of attention share: numpy's side of it, and how heads lie in rows."""

from __future__ import annotations

import numpy as np

from dvexport.targets.tvm.kernels.tokens.attention import Sizes, Strides


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def interleaved(tokens: int, sizes: Sizes, width: int) -> Strides:
    """Rows of tokens, in which the heads lie side by side."""
    return Strides(0, tokens * sizes.heads * width, width, sizes.heads * width)


def heads_of(x: np.ndarray, heads: int) -> np.ndarray:
    """`[batches, tokens, heads * width]` as `[batches, heads, tokens, width]`, in float64."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3).astype(np.float64)
