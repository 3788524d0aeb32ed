"""From kernels to object files: LLVM through TVM, one object a kernel, cached by content.

An object depends on the kernel's text, the machine, the version of TVM and this module; that is its key. Kernels of
one shape or of all shapes are compiled once and linked from the cache ever after.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from dvexport.errors import DeviceError
from dvexport.targets.tvm.build.cache import keep_entry, kept
from dvexport.targets.tvm.build.workers import Task, done_in_parallel
from dvexport.targets.tvm.kernels.abi import Kernel
from dvexport.targets.tvm.machine.machine import Machine

__all__ = ["check_tools", "compile_kernel", "compile_kernels", "scratch_folder"]

Progress = Callable[[str], None]

_KIND = "kernel"
"""What the cache calls them."""


def check_tools() -> None:
    """Raise DeviceError unless the packages of the extra `tvm` are installed."""
    for module in ("tvm", "ziglang"):
        if importlib.util.find_spec(module) is None:
            raise DeviceError(
                "compiled kernels need packages that are not installed",
                where=module,
                hint="pip install 'dvexport[tvm]'",
            )


def compile_kernels(
    kernels: Iterable[Kernel], machine: Machine, progress: Progress | None = None, beside: Sequence[Task] = ()
) -> dict[str, bytes]:
    """Return the object file of every kernel, by name, compiled on all cores.

    Args:
        kernels: equal names once.
        machine: what to generate code for.
        progress: told how many of the kernels that are not in the cache are done, and the last one's name.
        beside: what is worth doing at the same time if there is anything to compile; its results are dropped.

    Raises:
        DeviceError: LLVM does not know the machine.
    """
    unique = {kernel.name: kernel for kernel in kernels}
    keys = {name: _key(unique[name], machine) for name in sorted(unique)}
    objects = {name: data for name, key in keys.items() if (data := kept(_KIND, key)) is not None}
    missing = sorted(keys.keys() - objects.keys(), key=lambda name: (-len(unique[name].text), name))
    tell = progress or (lambda _: None)
    if missing:
        tell(f"compile kernels: 0 of {len(missing)}")
        tasks: list[Task] = [*beside, *(partial(_compile, unique[name], machine) for name in missing)]
        for number, data in done_in_parallel(tasks):
            if number >= len(beside):
                name = missing[number - len(beside)]
                objects[name] = data
                keep_entry(_KIND, keys[name], data)
                tell(f"compile kernels: {len(missing) - len(keys.keys() - objects.keys())} of {len(missing)}, {name}")
    return {name: objects[name] for name in keys}


def compile_kernel(kernel: Kernel, machine: Machine, progress: Progress | None = None) -> bytes:
    """Return the object file of one kernel; see `compile_kernels`."""
    return compile_kernels([kernel], machine, progress)[kernel.name]


def _compile(kernel: Kernel, machine: Machine) -> bytes:
    import tvm

    try:
        module = _generate(tvm.IRModule({kernel.name: kernel.func}), tvm.target.Target(machine.tvm_target))
    except Exception as error:  # LLVM's and TVM's errors share no base but this
        raise DeviceError(
            f"TVM can't compile the kernel {kernel.name}",
            where=f"{machine.triple}, {machine.mcpu}",
            why=str(error).strip().splitlines()[-1],
        ) from error
    return _object_file(module)


def _object_file(module: Any) -> bytes:
    """Return what LLVM writes: into memory where the system has such files, as on a full disk it ends the process."""
    if not hasattr(os, "memfd_create"):
        with scratch_folder() as folder:
            module.write_to_file(str(folder / "kernel.o"), "o")
            return (folder / "kernel.o").read_bytes()
    with open(os.memfd_create("kernel.o"), "rb") as stream:
        module.write_to_file(f"/proc/self/fd/{stream.fileno()}", "o")
        return stream.read()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a folder for a compiler's files, gone afterwards.

    Raises:
        DeviceError: it can't be made or written.
    """
    where = None
    try:
        with tempfile.TemporaryDirectory(prefix="dvexport-", ignore_cleanup_errors=True) as name:
            where = name
            yield Path(name)
    except OSError as error:
        if where and error.filename and not os.fspath(error.filename).startswith(where):
            raise  # it is about a file that is read
        raise DeviceError(
            "the compiler's temporary folder can't be written",
            where=where or error.filename,
            why=error.strerror or str(error),
            hint="free some space, or name another folder with TMPDIR",
        ) from error


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
    from tvm.target import codegen

    compiler = (tvm.__version__, codegen.llvm_version_major(), machine.tvm_target, Path(__file__).read_bytes())
    text = repr((kernel.name, *compiler, kernel.text))
    return hashlib.sha256(text.encode()).hexdigest()
