"""From object files to what is shipped: a shared library, and a static program that measures itself.

Both are our C runtime (`runtime/`), the kernels' objects and a generated table of them, compiled and linked by
the cross-compiler of the `ziglang` package, offline. Equal input gives equal bytes: nothing of this machine gets
in. The library knows its own identity, and refuses plans made for another.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dvexport.errors import DeviceError
from dvexport.targets.tvm.build.cache import cached
from dvexport.targets.tvm.build.compile import check_tools, scratch_folder
from dvexport.targets.tvm.build.libraries import compiler_environment, has_libraries, with_libraries
from dvexport.targets.tvm.build.link_bounds import bounds_source
from dvexport.targets.tvm.build.workers import Task, done_in_parallel
from dvexport.targets.tvm.kernels.abi import Kernel
from dvexport.targets.tvm.kernels.bounds import Contract
from dvexport.targets.tvm.machine.machine import Machine

__all__ = [
    "Entry", "kernel_table", "library_id", "library_tasks", "link_all", "link_library", "link_runner",
    "required_features", "table_source",
]  # fmt: skip

RUNTIME = Path(__file__).parents[1] / "runtime"

SOURCES = ("dvx.c", "plan.c", "derive.c", "bounds.c", "pool.c", "cpu.c", "system.c")
_HEADERS = ("dvx.h", "internal.h")
_TABLE = "table.c"

_COMPILE = (
    "-O2", "-g0", "-std=c11", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-D_FILE_OFFSET_BITS=64",
    "-fvisibility=hidden", "-ffunction-sections", "-fdata-sections", "-fno-unwind-tables",
    "-fno-asynchronous-unwind-tables",
)  # fmt: skip
_LINK = ("-s", "-Wl,--gc-sections", "-Wl,--build-id=none")
_SHARED = ("-shared", "-fPIC", "-Wl,-z,defs", "-Wl,-Bsymbolic")
"""Symbolic: two networks in one program keep to their own functions."""

_GLIBC = "2.17"
"""The oldest to run on: that of 2012, older than any board of the catalogue."""

_FEATURES: dict[str, tuple[str, ...]] = {
    "x86_64": (
        "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512ifma", "avx512vbmi", "avx512vbmi2",
        "avx512vnni", "avx512bitalg", "avx512vpopcntdq", "avx512bf16", "avx512fp16", "avx2", "avxvnni", "fma", "f16c",
        "avx", "gfni", "bmi2", "bmi", "lzcnt", "movbe", "sse4.2", "sse4.1", "ssse3", "sse3", "popcnt", "cx16",
    ),
    "aarch64": (
        "neon", "lse", "fullfp16", "fp16fml", "rdm", "complxnum", "dotprod", "i8mm", "bf16", "sve", "sve2",
    ),
    "arm": ("neon", "vfp3", "vfp4", "d32", "hwdiv", "hwdiv-arm"),
}  # fmt: skip
"""LLVM's names of features that can change the code of number kernels, as `runtime/cpu.c` knows them.

The most telling first: the first that a processor lacks is named. Features of cryptography and of the system are
left out: a Raspberry Pi 4 has a Cortex-A72 without AES.
"""

_ANDROID_LIBC = (
    "__cxa_finalize", "__errno", "calloc", "clock_gettime", "close", "free", "getauxval", "lseek", "madvise", "malloc",
    "memcmp", "memcpy", "memmove", "memset", "mmap", "munmap", "open", "posix_memalign", "pthread_create",
    "pthread_join", "read", "realloc", "strcmp", "strerror", "strlen", "syscall", "sysinfo", "vsnprintf",
)  # fmt: skip
_ANDROID_LIBM = tuple(
    f"{name}{suffix}"
    for name in (
        "acos", "asin", "atan", "atan2", "cbrt", "ceil", "cos", "cosh", "erf", "exp", "exp2", "expm1", "fabs", "floor",
        "fma", "fmax", "fmin", "fmod", "log", "log10", "log1p", "log2", "nearbyint", "pow", "rint", "round", "sin",
        "sinh", "sqrt", "tan", "tanh", "trunc",
    )
    for suffix in ("", "f")
)  # fmt: skip


_Link = Callable[[Path, list[str], Machine], None]
"""Makes the file `out` in a folder that holds the table's source and the objects of these names."""


@dataclass(frozen=True)
class Entry:
    """A row of the library's kernel table; plans name kernels by their row."""

    name: str
    buffers: int
    splits: bool
    contract: Contract


def kernel_table(kernels: Iterable[Kernel]) -> list[Entry]:
    """Return the table of `kernels`, by name; equal names once.

    Raises:
        AssertionError: a kernel does not state what it touches.
    """
    unique = {kernel.name: kernel for kernel in kernels}
    return [_entry(unique[name]) for name in sorted(unique)]


def _entry(kernel: Kernel) -> Entry:
    assert kernel.contract is not None, f"{kernel.name} does not state what it touches"
    return Entry(kernel.name, len(kernel.buffers), kernel.splits, kernel.contract)


def required_features(machine: Machine) -> tuple[str, ...]:
    """Return the features that kernels for `machine` may use, by LLVM's names.

    Raises:
        DeviceError: TVM is missing, or its LLVM does not know the machine.
    """
    check_tools()
    import tvm
    from tvm.target import codegen

    try:
        has = set(codegen.llvm_get_cpu_features(tvm.target.Target(machine.tvm_target)))
    except Exception as error:  # TVM's errors share no base but this
        raise DeviceError(
            "LLVM does not know the machine",
            where=f"{machine.triple}, {machine.mcpu}",
            why=str(error).strip().splitlines()[-1],
        ) from error
    return tuple(name for name in _FEATURES[_architecture(machine)] if name in has)


def library_id(objects: Mapping[str, bytes], table: Sequence[Entry], machine: Machine) -> bytes:
    """Return the 32 bytes by which a plan names the library that it is for.

    Args:
        objects: object file of every kernel of the table, by name.
        table: as `kernel_table` returns it.
        machine: what the objects are for.
    """
    digest = hashlib.sha256(repr((_architecture(machine), required_features(machine), list(table))).encode())
    for name in (*_HEADERS, *SOURCES):
        digest.update(hashlib.sha256((RUNTIME / name).read_bytes()).digest())
    for entry in table:
        digest.update(hashlib.sha256(objects[entry.name]).digest())
    return digest.digest()


def link_library(objects: Mapping[str, bytes], table: Sequence[Entry], machine: Machine) -> bytes:
    """Return the shared library: the functions of `runtime/dvx.h` and nothing else are visible in it.

    Args:
        objects, table, machine: as `library_id`.

    Raises:
        DeviceError: a package is missing, or the linker fails, as on a kernel that calls what no library has.
    """
    return _cached(_library_kind(machine), objects, table, machine)


def link_runner(objects: Mapping[str, bytes], table: Sequence[Entry], machine: Machine) -> bytes:
    """Return the program of `runtime/runner.c`: static, so that it runs on any Linux kernel, Android's too.

    Args, Raises: as `link_library`.
    """
    return _cached(_RUNNER, objects, table, machine)


def link_all(objects: Mapping[str, bytes], table: Sequence[Entry], machine: Machine) -> tuple[bytes, bytes]:
    """Return the shared library and the runner, linked side by side; see `link_library` and `link_runner`."""
    tasks = [partial(link, objects, table, machine) for link in (link_runner, link_library)]
    done = dict(done_in_parallel(tasks))
    return done[1], done[0]


def library_tasks(machine: Machine) -> list[Task]:
    """Return what is worth doing before the first link for a machine: its C libraries, which take half a minute."""
    kinds = [_RUNNER, _library_kind(machine)]
    missing = [kind for kind in kinds if not has_libraries(_libraries_key(kind, machine))]
    return [partial(_make_libraries, kind, machine) for kind in missing]


def table_source(table: Sequence[Entry], identity: bytes, features: Iterable[str]) -> str:
    """Return the C text of the kernel table; a row's function unpacks the buffers."""
    lines = ['#include "internal.h"', ""]
    for i, entry in enumerate(table):
        arguments = ", ".join(["void *"] * entry.buffers + ["int32_t", "int32_t"])
        values = ", ".join([f"b[{k}]" for k in range(entry.buffers)] + ["part", "parts"])
        lines += [
            f'extern int32_t k{i}({arguments}) __asm__("{entry.name}");',
            f"static int32_t call{i}(void *const *b, int32_t part, int32_t parts) {{",
            "    (void)b;",
            f"    return k{i}({values});",
            "}",
            *bounds_source(entry.contract, i),
        ]
    rows = [
        f'    {{"{e.name}", call{i}, {e.buffers}, {int(e.splits)}, buffers{i}, bounds{i}}},'
        for i, e in enumerate(table)
    ]
    bytes_ = ", ".join(str(byte) for byte in identity)
    names = "".join(f'"{name}", ' for name in features)
    return "\n".join(
        [
            *lines,
            f"const kernel_entry dvx_kernels[{len(table) + 1}] = {{",
            *rows,
            "    {0, 0, 0, 0, 0, 0},",
            "};",
            f"const uint32_t dvx_kernel_count = {len(table)};",
            f"const uint8_t dvx_library_sha256[32] = {{{bytes_}}};",
            f"const char *const dvx_cpu_features[] = {{{names}0}};",
            "",
        ]
    )


def _link_shared(folder: Path, objects: list[str], machine: Machine) -> None:
    target = _zig_target(machine, f"gnu.{_GLIBC}", f"gnueabihf.{_GLIBC}")
    files = [*_exports(folder), *_sources(folder), *objects, "-lm"]
    _zig(folder, ["cc", "-target", target, *_COMPILE, *_LINK, *_SHARED, *files])


def _link_static(folder: Path, objects: list[str], machine: Machine) -> None:
    # musl gives threads 128 KiB of stack unless the program asks for more.
    link = [*_LINK, "-static", "-Wl,-z,stack-size=1048576", *_sources(folder, "runner.c"), *objects, "-lm"]
    _zig(folder, ["cc", "-target", _zig_target(machine, "musl", "musleabihf"), *_COMPILE, *link])


def _link_android(folder: Path, objects: list[str], machine: Machine) -> None:
    """Link against stand-ins for Android's libraries, which ziglang has not: their names and functions suffice.

    What is compiled with musl's headers calls only functions whose arguments are the same in both.
    """
    target = ["-target", _zig_target(machine, "musl", "musleabihf")]
    for name, functions in (("libc", _ANDROID_LIBC), ("libm", _ANDROID_LIBM)):
        (folder / f"{name}.c").write_text("".join(map(_stand_in, functions)), encoding="utf-8")
        files = ["-shared", "-nostdlib", "-s", f"-Wl,-soname,{name}.so", f"{name}.c"]
        _zig(folder, ["cc", *target, *files], f"{name}.so")
    # Pages of 16 KiB are what new phones have; both hash tables, for old loaders too.
    link = [*_SHARED, "-nostdlib", "-Wl,-z,max-page-size=16384", "-Wl,--hash-style=both"]
    compile_ = [*_COMPILE, "-mno-outline-atomics"] if machine.is_aarch64 else list(_COMPILE)
    sources = _sources(folder, "android.c")
    for source in sources:  # one by one: without a C library there are no headers either, so compiling comes first
        _zig(folder, ["cc", *target, *compile_, "-fPIC", "-c", source], f"{source}.o")
    files = [*_exports(folder), *(f"{source}.o" for source in sources), *objects, "libc.so", "libm.so"]
    _zig(folder, ["cc", *target, *_LINK, *link, *files])


def _stand_in(function: str) -> str:
    """Return C text that defines a function of any name, those that the compiler has ideas about included."""
    return f'void s_{function}(void) __asm__("{function}");\nvoid s_{function}(void) {{}}\n'


def _exports(folder: Path) -> list[str]:
    (folder / "exports.map").write_text("{ global: dvx_*; local: *; };\n", encoding="utf-8")
    return ["-Wl,--version-script=exports.map"]


def _sources(folder: Path, *more: str) -> list[str]:
    for name in (*_HEADERS, *SOURCES, *more):
        (folder / name).write_bytes((RUNTIME / name).read_bytes())
    return [*SOURCES, *more, _TABLE]


_RUNNER = "runner"

_LINKS: dict[str, _Link] = {"library": _link_shared, "android": _link_android, _RUNNER: _link_static}
"""How each kind of output is linked."""


def _library_kind(machine: Machine) -> str:
    return "android" if "android" in machine.triple else "library"


def _libraries_key(kind: str, machine: Machine) -> str:
    return _key(kind, _architecture(machine))


def _make_libraries(kind: str, machine: Machine) -> bytes:
    """Link a library of no kernels, for what the linker keeps of it."""
    with scratch_folder() as folder:
        (folder / _TABLE).write_text(table_source([], bytes(32), ()), encoding="utf-8")
        with_libraries(_libraries_key(kind, machine), folder, lambda: _LINKS[kind](folder, [], machine))
    return b""


def _cached(kind: str, objects: Mapping[str, bytes], table: Sequence[Entry], machine: Machine) -> bytes:
    identity = library_id(objects, table, machine)

    def make() -> bytes:
        with scratch_folder() as folder:
            source = table_source(table, identity, required_features(machine))
            (folder / _TABLE).write_text(source, encoding="utf-8")
            files = [f"k{i}.o" for i in range(len(table))]
            for file, entry in zip(files, table, strict=True):
                (folder / file).write_bytes(objects[entry.name])
            with_libraries(_libraries_key(kind, machine), folder, lambda: _LINKS[kind](folder, files, machine))
            return (folder / "out").read_bytes()

    return cached(kind, _key(kind, machine.triple, identity), make)


def _key(*what: object) -> str:
    """Return what stands for `what` and for all that linking depends on beside it."""
    version = importlib.metadata.version("ziglang")
    files = b"".join((RUNTIME / name).read_bytes() for name in ("runner.c", "android.c"))
    return hashlib.sha256(repr((what, version, Path(__file__).read_bytes(), files)).encode()).hexdigest()


def _zig(folder: Path, arguments: list[str], output: str = "out") -> None:
    """Run the compiler in `folder`, all names relative, so that no path gets into its output."""
    command = [sys.executable, "-m", "ziglang", *arguments, "-o", output]
    environment, what = compiler_environment(folder), "the native artifact can't be linked"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", env=environment)
    except OSError as error:
        raise DeviceError(what, where=command[0], why=f"the compiler can't be started: {error.strerror}") from error
    if done.returncode < 0:
        raise DeviceError(what, where=arguments[2], why=f"the compiler was ended by {_signal(-done.returncode)}")
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise DeviceError(what, where=f"{arguments[2]}, in {folder}", why="; ".join(errors[:3]))


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _zig_target(machine: Machine, abi: str, abi_arm: str) -> str:
    architecture = _architecture(machine)
    return f"{architecture}-linux-{abi_arm if architecture == 'arm' else abi}"


def _architecture(machine: Machine) -> str:
    first = machine.triple.partition("-")[0]
    if first.startswith("arm"):
        first = "arm"
    if first not in _FEATURES:
        raise DeviceError("the native backend does not know this processor", where=machine.triple)
    return first
