"""Element types: how kernels, planes, lists and rates call them, and how many bytes an element takes.

Names are XNNPACK's (`f32`, `qs8` without its scales is `s8`); they are the first word of a kernel's name. A kernel of
another precision takes another `DType` and is another kernel: see "Adding a precision" in docs/native.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dvexport.errors import UsageError

__all__ = [
    "BF16",
    "BOOL",
    "F16",
    "F32",
    "F64",
    "LINE_BYTES",
    "S8",
    "S32",
    "S64",
    "U8",
    "DType",
    "dtype_of",
    "kernel_name",
    "require_dtype",
]

LINE_BYTES = 64
"""Bytes of a cache line: planes, constants and buffers start on one."""


@dataclass(frozen=True)
class DType:
    """An element type.

    Attributes:
        name: in names of kernels and keys of target files.
        bytes: the size of an element.
        tvm: what TVM calls it.
        numpy: what numpy calls an array of it; for `bf16`, which numpy does not know, that of its bits.
    """

    name: str
    bytes: int
    tvm: str
    numpy: str

    @property
    def line(self) -> int:
        """Elements of a cache line."""
        return LINE_BYTES // self.bytes

    @property
    def array(self) -> np.dtype:
        """The type of an array's elements."""
        return np.dtype(self.numpy)

    def vector(self, lanes: int) -> str:
        """Return what TVM calls a vector of so many elements."""
        return self.tvm if lanes == 1 else f"{self.tvm}x{lanes}"

    def size(self, count: int) -> int:
        """Return the bytes of `count` elements."""
        return count * self.bytes

    def __str__(self) -> str:
        """Return the name."""
        return self.name


F32 = DType("f32", 4, "float32", "float32")
F16 = DType("f16", 2, "float16", "float16")
BF16 = DType("bf16", 2, "bfloat16", "uint16")
F64 = DType("f64", 8, "float64", "float64")
S8 = DType("s8", 1, "int8", "int8")
U8 = DType("u8", 1, "uint8", "uint8")
S32 = DType("s32", 4, "int32", "int32")
S64 = DType("s64", 8, "int64", "int64")
BOOL = DType("bool", 1, "bool", "bool")

_BY_TVM = {each.tvm: each for each in (F32, F16, BF16, F64, S8, U8, S32, S64, BOOL)}


def dtype_of(spelling: object) -> DType:
    """Return the element type that TVM or numpy spells so, such as `float32`.

    Raises:
        UsageError: compiled kernels have no buffers of such elements.
    """
    try:
        return _BY_TVM[str(spelling)]
    except KeyError:
        known = ", ".join(_BY_TVM)
        raise UsageError(f"compiled kernels have no buffers of {spelling}", hint=f"elements are {known}") from None


def require_dtype(kernel: str, dtype: DType, *supported: DType) -> None:
    """Refuse an element type that a kernel's generator has no code for.

    Args:
        kernel: what a person calls it.
        dtype: what it was asked for.
        supported: what it can do; `f32` by default.

    Raises:
        UsageError: it is none of these.
    """
    known = supported or (F32,)
    if dtype not in known:
        raise UsageError(
            f"no {kernel} kernel computes in {dtype}",
            why=f"its generator writes code for {', '.join(map(str, known))}",
            hint='see "Adding a precision" in docs/native.md',
        )


def kernel_name(dtype: DType, kernel: str) -> str:
    """Return the symbol of a kernel that computes in `f32` alone: the element type is its first word.

    Raises:
        UsageError: it is asked for another element type.
    """
    require_dtype(kernel, dtype)
    return f"{dtype}_{kernel}"
