"""From kernels to object files: LLVM through TVM, one object a kernel, cached by content.

An object depends on the kernel's text, the machine and TVM's version; that is its key. Kernels of one shape or
of all shapes are compiled once and linked from the cache ever after.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dvexport.errors import DeviceError, UsageError
from dvexport.files import atomic_write
from dvexport.targets.tvm.kernels.abi import Kernel
from dvexport.targets.tvm.machine import Machine

__all__ = ["cache_folder", "check_tools", "compile_kernel", "compile_kernels", "keep"]

Progress = Callable[[str], None]

_FORMAT = "4"
"""Changes when kernels are compiled differently from the same text."""


def check_tools() -> None:
    """Raise DeviceError unless the packages of the extra `tvm` are installed."""
    for module in ("tvm", "ziglang"):
        if importlib.util.find_spec(module) is None:
            raise DeviceError(
                "compiled kernels need packages that are not installed",
                where=module,
                hint="pip install 'dvexport[tvm]'",
            )


def cache_folder() -> Path:
    """Return where compiled kernels are kept: `$DVEXPORT_CACHE`, or the user's cache folder."""
    named = os.environ.get("DVEXPORT_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dvexport"


def compile_kernels(kernels: Iterable[Kernel], machine: Machine, progress: Progress | None = None) -> dict[str, bytes]:
    """Return the object file of every kernel, by name.

    Args:
        kernels: equal names once.
        machine: what to generate code for.
        progress: called with the name of each kernel that was not in the cache.

    Raises:
        DeviceError: LLVM does not know the machine.
    """
    unique = {kernel.name: kernel for kernel in kernels}
    return {name: compile_kernel(unique[name], machine, progress) for name in sorted(unique)}


def compile_kernel(kernel: Kernel, machine: Machine, progress: Progress | None = None) -> bytes:
    """Return the object file of one kernel; see `compile_kernels`."""
    path = cache_folder() / "kernels" / f"{_key(kernel, machine)}.o"
    try:
        return path.read_bytes()
    except OSError:
        pass
    if progress is not None:
        progress(f"compile {kernel.name}")
    data = _compile(kernel, machine)
    keep(path, data)
    return data


def keep(path: Path, data: bytes) -> None:
    """Write a file of the cache; one that can't be written costs time, nothing else."""
    with suppress(OSError, UsageError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)


def _compile(kernel: Kernel, machine: Machine) -> bytes:
    import tempfile

    import tvm

    try:
        module = _generate(tvm.IRModule({kernel.name: kernel.func}), tvm.target.Target(machine.tvm_target))
    except Exception as error:  # LLVM's and TVM's errors share no base but this
        raise DeviceError(
            f"TVM can't compile the kernel {kernel.name}",
            where=f"{machine.triple}, {machine.mcpu}",
            why=str(error).strip().splitlines()[-1],
        ) from error
    with tempfile.TemporaryDirectory(prefix="dvexport-") as folder:
        path = Path(folder) / "kernel.o"
        module.write_to_file(str(path), "o")
        return path.read_bytes()


def _generate(module: Any, target: Any) -> Any:
    """Run what passes a kernel needs, then LLVM.

    TVM's own pipeline takes twenty times as long on functions of this size, most of it to shrink buffers and
    prove bounds. Kernels are written with neither left to do, and LLVM makes the same inner loops of them.
    """
    import tvm
    from tvm.s_tir import transform as s_tir
    from tvm.tirx import transform as tirx

    passes = [
        tirx.BindTarget(target.with_host(target)),
        s_tir.PlanAndUpdateBufferAllocationLocation(),
        s_tir.ConvertBlocksToOpaque(),
        s_tir.LowerOpaqueBlock(),
        tirx.FlattenBuffer(),
        tirx.StmtSimplify(),  # without it no index is seen to be contiguous, and LLVM keeps register blocks in memory
        tirx.VectorizeLoop(),
        tirx.StorageRewrite(),
        tirx.UnrollLoop(),
        tirx.LowerTVMBuiltin(),
        tirx.LowerIntrin(),
    ]
    return tvm.get_global_func("target.build.llvm")(tvm.transform.Sequential(passes)(module), target)


def _key(kernel: Kernel, machine: Machine) -> str:
    import tvm

    text = "\n".join([_FORMAT, tvm.__version__, repr(machine.tvm_target), kernel.func.script()])
    return hashlib.sha256(text.encode()).hexdigest()
