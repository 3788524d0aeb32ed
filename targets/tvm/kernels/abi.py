"""The calling convention of kernels, and the frame that a generator writes one in.

A kernel is a C function without a result to look at:

    int32_t NAME(void *b0, ..., void *bn, int32_t part, int32_t parts);

Buffers are flat, start on 64 bytes and don't overlap, but where a kernel's text says so. Thread `part` of
`parts` does its share; parts = 1 does everything. A kernel allocates nothing, keeps nothing and reads every extent
that a gate decides from its buffers, so a step is a straight list of calls.

TVM would wrap a function in checks of its own tensor type. Functions that already state a calling convention
are left alone, and what comes out has no undefined symbol.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import tvm.tirx as tx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.bounds import Buffer as Bound
from dvexport.targets.tvm.kernels.bounds import Contract, Made, Needs, contract_of
from dvexport.targets.tvm.machine.dtype import S32, S64, DType, dtype_of

__all__ = ["Frame", "Kernel", "i64", "prefetch", "prefetch_ahead", "share", "write_kernel", "write_serial_kernel"]

_C_ABI = 1
"""`tvm::CallingConv::kCPackedFunc`: any but the default keeps `MakePackedAPI` away."""

_AHEAD = 512
"""Bytes of a row of weights that are prefetched: the value from 128 to 4096 that measured best."""

_UNBOUNDED = 1 << 40
"""Declared elements of a buffer: its real size is the plan's business."""


@dataclass(frozen=True)
class Kernel:
    """A generated function.

    Attributes:
        name: its symbol; equal names are equal functions.
        func: its TIR.
        buffers: names of its buffers, in order.
        splits: whether several threads may share a call.
        contract: what it touches; a library takes no kernel that does not say so (`bounds.py`).
    """

    name: str
    func: Any
    buffers: tuple[str, ...]
    splits: bool = True
    contract: Contract | None = field(default=None, compare=False)

    @functools.cached_property
    def text(self) -> str:
        """All of the function, in TVM's script; for a large kernel it takes a tenth of a second to write."""
        return str(self.func.script(show_meta=True))


@dataclass
class Frame:
    """A kernel being written: its buffers by name, and which thread's share this is."""

    buffers: dict[str, Any]
    part: Any
    parts: Any
    types: Mapping[str, DType] = field(default_factory=dict)
    contract: Contract | None = None
    kernel: Kernel = field(init=False)

    def states(self, buffers: Mapping[str, Bound], *needs: Needs, makes: tuple[Made, ...] = ()) -> None:
        """State what the kernel touches: every buffer, by name; what must hold; the lists that it writes."""
        self.contract = contract_of(self.types, buffers, *needs, makes=makes)

    def extents(self, places: Iterable[int]) -> list[Any]:
        """Return entries of the buffer `shape`, bound in the order of their places."""
        return [T.bind(self.buffers["shape"][int(place)]) for place in places]

    def __getattr__(self, name: str) -> Any:
        """Return the buffer of a name."""
        try:
            return self.__dict__["buffers"][name]
        except KeyError:
            raise AttributeError(name) from None


def write_kernel(name: str, **buffers: DType | str) -> AbstractContextManager[Frame]:
    """Open a kernel that threads may share; inside, write its body with `tvm.tirx.script.builder`.

    Args:
        name: its symbol.
        buffers: element type by name, or what TVM calls it, in the order of the C function's arguments.

    Yields:
        The frame; after the block its `kernel` is set.
    """
    return _write(name, buffers, splits=True)


def write_serial_kernel(name: str, **buffers: DType | str) -> AbstractContextManager[Frame]:
    """Open a kernel that one thread runs, as its body uses no `part`; else as `write_kernel`."""
    return _write(name, buffers, splits=False)


@contextmanager
def _write(name: str, buffers: Mapping[str, DType | str], splits: bool) -> Iterator[Frame]:
    types = {key: dtype if isinstance(dtype, DType) else dtype_of(dtype) for key, dtype in buffers.items()}
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "global_symbol": name, "calling_conv": _C_ABI})
        handles = {key: T.arg(key, T.handle(dtype.tvm, "global")) for key, dtype in types.items()}
        part, parts = T.arg("part", T.int32()), T.arg("parts", T.int32())
        declared = {key: T.decl_buffer((_UNBOUNDED,), types[key].tvm, data=handle) for key, handle in handles.items()}
        frame = Frame(declared, part, parts, types)
        yield frame
    frame.kernel = Kernel(name, builder.get(), tuple(buffers), splits, frame.contract)


def i64(value: Any) -> Any:
    """Widen an index. Addresses are computed in 64 bits: 32 would cost a sign extension each."""
    return tx.IntImm(S64.tvm, int(value)) if isinstance(value, int) else tx.Cast(S64.tvm, value)


def prefetch_ahead(buffer: Any, at: Any) -> None:
    """Ask for the weights that follow those of a row at `at`, before they are needed; they may end before."""
    prefetch(buffer, at + _AHEAD // dtype_of(buffer.dtype).bytes)


def prefetch(buffer: Any, at: Any, *, write: bool = False, near: bool = True) -> None:
    """Ask for the cache line of an element; it may lie beyond the buffer.

    Args:
        write: it will be written: no other core shall have it.
        near: bring it to the first level cache; otherwise to the second.
    """
    arguments = [tx.IntImm(S32.tvm, value) for value in (int(write), 3 if near else 2, 1)]  # for `llvm.prefetch`
    T.evaluate(tx.call_intrin("void", "tirx.prefetch", tx.address_of(buffer[at]), *arguments))


def share(count: Any, part: Any, parts: Any) -> tuple[Any, Any]:
    """Return the range of `count` items that is thread `part`'s: contiguous, and of nearly equal size."""
    return (
        T.bind(tx.truncdiv(count * part, parts)),
        T.bind(tx.truncdiv(count * (part + 1), parts)),
    )
