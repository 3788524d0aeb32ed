"""Winograd's transforms on vectors whose lanes are tiles, and the shuffles between pixels and tiles.

All shuffles stay within groups of four lanes, so they are one instruction each on every instruction set:
`unpcklps` and its kin on x86, `zip1` and `zip2` on ARM.
"""

from __future__ import annotations

from typing import Any

import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.conv.winograd_points import FAR, NEAR
from dvexport.targets.tvm.kernels.vectors import constant, join, load
from dvexport.targets.tvm.machine.dtype import DType
from dvexport.targets.tvm.machine.machine import Machine

__all__ = [
    "even_odd",
    "gather",
    "input_transform",
    "interleave",
    "multiply_add",
    "output_transform",
    "transpose4",
]


def gather(buffer: Any, offsets: list[Any], width: int) -> Any:
    """Return the vector of `width` elements from each of several places, one after the other."""
    return T.bind(join([load(buffer, offset, width) for offset in offsets], width))


def multiply_add(x: Any, y: Any, z: Any, dtype: DType, machine: Machine) -> Any:
    """Return x y + z, rounded once where the machine can.

    LLVM contracts a product and a sum by itself but on 32-bit ARM, where it takes the two for faster.
    """
    if not (machine.triple.startswith("arm") and "+vfp4" in machine.features):
        return z + x * y
    intrinsic = f"llvm.fma.v{machine.lanes}{dtype}"
    return tx.call_llvm_pure_intrin(dtype.vector(machine.lanes), intrinsic, x, y, z)


def input_transform(x: list[Any], m: int, dtype: DType, lanes: int) -> list[Any]:
    """Return B' x for m + 2 vectors x."""
    if m == 2:
        return [T.bind(value) for value in (x[2] - x[0], x[1] + x[2], x[2] - x[1], x[3] - x[1])]

    def pair(even: Any, odd: Any, point: float) -> list[Any]:
        """Values of a polynomial at +-point, from its even and its odd half."""
        even, odd = T.bind(even), T.bind(odd)
        return [T.bind(even + odd * constant(point, dtype, lanes)), T.bind(even - odd * constant(point, dtype, lanes))]

    both, near2, far2 = (constant(square, dtype, lanes) for square in (NEAR**2 + FAR**2, NEAR**2, FAR**2))
    first, last = (T.bind(x[i] + (x[i + 4] - x[i + 2] * both)) for i in (0, 1))
    near = pair(x[4] - x[2] * far2, x[3] - x[1] * far2, NEAR)
    far = pair(x[4] - x[2] * near2, x[3] - x[1] * near2, FAR)
    return [first, *near, *far, last]


def output_transform(x: list[Any], m: int, dtype: DType, lanes: int) -> list[Any]:
    """Return A' x for m + 2 vectors x."""
    if m == 2:
        return [T.bind(x[0] + x[1] + x[2]), T.bind(x[1] - x[2] + x[3])]
    near, near_odd = T.bind(x[1] + x[2]), T.bind(x[1] - x[2])
    far, far_odd = T.bind(x[3] + x[4]), T.bind(x[3] - x[4])
    return [
        T.bind(x[0] + near + far),
        T.bind(near_odd * constant(NEAR, dtype, lanes) + far_odd * constant(FAR, dtype, lanes)),
        T.bind(near * constant(NEAR**2, dtype, lanes) + far * constant(FAR**2, dtype, lanes)),
        T.bind(x[5] + near_odd * constant(NEAR**3, dtype, lanes) + far_odd * constant(FAR**3, dtype, lanes)),
    ]


def transpose4(x: list[Any], lanes: int) -> list[Any]:
    """Transpose the 4 x 4 matrices that four vectors hold in each group of four lanes."""
    low, high = interleave(x[0], x[1], lanes), interleave(x[2], x[3], lanes)
    return [pick(left, right) for left, right in zip(low, high, strict=True) for pick in _pair_pickers(lanes)]


def interleave(x: Any, y: Any, lanes: int) -> list[Any]:
    """Return x0 y0 x1 y1 and x2 y2 x3 y3 of each group of four lanes."""
    return [_shuffle(x, y, lanes, (k, lanes + k, k + 1, lanes + k + 1)) for k in (0, 2)]


def even_odd(x: Any, y: Any, lanes: int) -> list[Any]:
    """Return x0 x2 y0 y2 and x1 x3 y1 y3 of each group of four lanes."""
    return [_shuffle(x, y, lanes, (k, k + 2, lanes + k, lanes + k + 2)) for k in (0, 1)]


def _pair_pickers(lanes: int) -> list[Any]:
    """Return functions to x0 x1 y0 y1 and to x2 x3 y2 y3 of each group of four lanes."""

    def picker(k: int) -> Any:
        return lambda x, y: _shuffle(x, y, lanes, (k, k + 1, lanes + k, lanes + k + 1))

    return [picker(0), picker(2)]


def _shuffle(x: Any, y: Any, lanes: int, group: tuple[int, ...]) -> Any:
    return T.bind(tx.Shuffle([x, y], [lane + index for lane in range(0, lanes, 4) for index in group]))
