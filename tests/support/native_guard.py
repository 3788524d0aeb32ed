"""Memory that ends where a kernel says that it touches it: one element farther is a fault."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from dvexport.targets.tvm.kernels.abi import Kernel
from dvexport.targets.tvm.kernels.bounds import Contract, ListKind, Refused, evaluate
from dvexport.targets.tvm.plan_check import List, constant_list

_PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass
class _Given:
    """What a kernel's expressions are about, of arrays (`bounds.Facts`)."""

    arrays: dict[str, np.ndarray]
    lists: dict[str, List]
    parts: int

    def entries(self, buffer: str, first: int, count: int, step: int) -> list[int]:
        data = self.arrays[buffer].reshape(-1)
        if count and first + (count - 1) * step >= data.size:
            raise Refused(f"{buffer} is too short")
        return [int(data[first + i * step]) for i in range(count)]

    def of_list(self, buffer: str, what: str) -> int:
        return int(getattr(self.lists[buffer], what))


def touched(kernel: Kernel, arrays: Sequence[np.ndarray], parts: int) -> list[int]:
    """Bytes of each array that a kernel says it touches; asserts that its other needs hold, and the arrays suffice."""
    stated = _stated(kernel)
    given = _given(stated, arrays, parts)
    sizes = []
    for (name, buffer), array in zip(stated.buffers, arrays, strict=True):
        assert buffer.bytes == array.itemsize, name
        size = evaluate(buffer.elements, given) * buffer.bytes
        assert size <= array.nbytes, f"{kernel.name} states {size} bytes of {name}, it has {array.nbytes}"
        sizes.append(array.nbytes if buffer.reads else size)
    for less, more in stated.needs:
        assert evaluate(less, given) <= evaluate(more, given), (kernel.name, less, more)
    return sizes


def check_lists(kernel: Kernel, arrays: Sequence[np.ndarray], parts: int) -> None:
    """Assert that the lists that a kernel has written are as it says."""
    stated = _stated(kernel)
    given = _given(stated, arrays, parts)
    for made in stated.makes:
        pieces = evaluate(made.pieces, given)
        buffer = dict(stated.buffers)[made.buffer]
        as_read = type(buffer)(buffer.elements, reads=made.kind, pieces=pieces)
        found = constant_list(given.arrays[made.buffer].reshape(-1), as_read)
        for what in ("count", "limit", "inputs"):
            most = evaluate(getattr(made, what), given)
            assert getattr(found, what) <= most, f"{kernel.name}: {what} of {made.buffer}"


@contextmanager
def guarded(arrays: Sequence[np.ndarray], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Yield an address for every array, where so many of its bytes lie with a page before and after that faults.

    What a kernel writes is in the arrays afterwards. Arrays that begin together stay together.
    """
    by_start: dict[int, int] = {}
    for array, size in zip(arrays, sizes, strict=True):
        by_start[array.ctypes.data] = max(by_start.get(array.ctypes.data, 0), size)
    maps = {start: _Region(start, size) for start, size in by_start.items()}
    try:
        yield [maps[array.ctypes.data].address for array in arrays]
        for region in maps.values():
            region.give_back()
    finally:
        for region in maps.values():
            region.close()


class _Region:
    def __init__(self, start: int, size: int) -> None:
        self._start, self._size = start, size
        inner = -(-max(size, 1) // _PAGE) * _PAGE
        self._map = mmap.mmap(-1, inner + 2 * _PAGE)
        self._view = ctypes.c_char.from_buffer(self._map)
        base = ctypes.addressof(self._view)
        for guard in (base, base + _PAGE + inner):
            assert _LIBC.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(_PAGE), 0) == 0
        self.address = base + _PAGE + inner - size
        ctypes.memmove(self.address, start, size)

    def give_back(self) -> None:
        ctypes.memmove(self._start, self.address, self._size)

    def close(self) -> None:
        del self._view
        self._map.close()


def _stated(kernel: Kernel) -> Contract:
    assert kernel.contract is not None, kernel.name
    return kernel.contract


def _given(stated: Contract, arrays: Sequence[np.ndarray], parts: int) -> _Given:
    by_name = dict(zip((name for name, _ in stated.buffers), arrays, strict=True))
    lists = {
        name: constant_list(by_name[name].reshape(-1), buffer)
        for name, buffer in stated.buffers
        if buffer.reads is not ListKind.NONE
    }
    return _Given(by_name, lists, parts)
