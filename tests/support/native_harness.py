"""Call a compiled kernel from a test: arrays in, the same arrays changed."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from native_guard import check_lists, guarded, touched

from dvexport.targets import catalogue
from dvexport.targets.tvm.build.compile import compile_kernel
from dvexport.targets.tvm.kernels.abi import Kernel
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.machine.machine import Machine, machine_of

_PADDING = 64


def host_machine() -> Machine:
    """The machine that tests run on."""
    return machine_of(catalogue.load(catalogue.HOST).cpu)


def aligned(array: np.ndarray, spare: int = 0) -> np.ndarray:
    """A copy that starts on 64 bytes, with `spare` elements of 0xAA bytes around it, to detect stray writes."""
    data = np.ascontiguousarray(array)
    around = -(-spare * data.itemsize // _PADDING) * _PADDING
    memory = np.full(data.nbytes + 2 * around + _PADDING, 0xAA, np.uint8)
    start = -memory.ctypes.data % _PADDING + around
    view = memory[start : start + data.nbytes].view(data.dtype).reshape(data.shape)
    view[...] = data
    return view


def unpadded(plane: Plane, image: np.ndarray) -> np.ndarray:
    """Planes of an image whose padding nobody has cleared."""
    return np.where(plane.inside() != 0, plane.pack(image), np.float32(np.nan))


@functools.cache
def _loaded(made: bytes) -> ctypes.CDLL:
    """Link an object file, once: many tests call one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        source.write_bytes(made)
        command = [sys.executable, "-m", "ziglang", "cc", "-shared", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))


class Callable:
    """A kernel, compiled and loaded."""

    def __init__(self, kernel: Kernel, machine: Machine | None = None) -> None:
        self.kernel = kernel
        self._function = _loaded(compile_kernel(kernel, machine or host_machine()))[kernel.name]

    def __call__(self, *arrays: np.ndarray, threads: int = 1) -> None:
        """Run every part in turn; arrays are in the order of the kernel's buffers, and must start on 64 bytes.

        The kernel gets copies of them that end where it says that it touches them: beyond is a page that faults.
        """
        assert len(arrays) == len(self.kernel.buffers), self.kernel.buffers
        assert all(array.ctypes.data % _PADDING == 0 and array.flags.c_contiguous for array in arrays)
        with guarded(arrays, touched(self.kernel, arrays, threads)) as addresses:
            pointers = [ctypes.c_void_p(address) for address in addresses]
            for part in range(threads):
                self._function(*pointers, ctypes.c_int32(part), ctypes.c_int32(threads))
        check_lists(self.kernel, arrays, threads)
