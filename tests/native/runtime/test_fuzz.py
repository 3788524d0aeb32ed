"""The runtime under sanitizers: damaged and hostile files give an error text and nothing else; threads don't race.

Files are changed at random, and in ways that keep the form of a plan: places, sizes, numbers that kernels take their
extents from, lists, calls. Checksums are made right again. Kernels are compiled ones, and memory ends where it ends:
whatever opens must step.
"""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native_harness import host_machine
from native_networks import variants
from oracle_check import FRAMES, traced
from runtime_plans import Network, network, sample_network

from dvexport.targets.tvm.build import link
from dvexport.targets.tvm.calls.memory import Constants
from dvexport.targets.tvm.calls.place import place
from dvexport.targets.tvm.calls.write import write_draft

CASES = {"sample": 4000, "network": 400}
HERE = Path(__file__).parent
FLAGS = ["-O1", "-g", "-std=c11", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-fno-omit-frame-pointer"]

COMPILERS = {
    "address and undefined": (["gcc"], ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]),
    "undefined": ([sys.executable, "-m", "ziglang", "cc"], ["-fsanitize=undefined"]),  # it has no address sanitizer
}
WRAPPED = ["-Wl,--wrap=dvx_memory_take,--wrap=dvx_memory_free"]
NO_SANITIZER = ("cannot find", "unexpected memory mapping")
"""What a compiler says that lacks a sanitizer's library, and that library under a kernel it does not know."""


def small_network() -> Network:
    """A network with gates of channels and tiles, as `test_network.py` compiles it."""
    machine, constants = host_machine(), Constants()
    model = variants(traced("dstep", "uneven"), "stream", FRAMES, ("gated",))["gated"]
    draft = write_draft(model, machine, constants, threads=4)
    plan = place(draft).plan
    return network(plan, list(draft.calls.kernels.values()), bytes(constants.file()), machine)


NETWORKS = {"sample": sample_network, "network": small_network}


def build(
    folder: Path, compiler: list[str], sanitizers: list[str], driver: str, net: Network, *, idle: bool = False
) -> list[str]:
    """Build a driver around the runtime and a network's kernels; return its command, files included.

    Args:
        idle: put kernels in their place that do nothing.
    """
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"{compiler[0]} is not installed")
    identity = link.library_id(net.objects, net.table, net.machine)
    (folder / "table.c").write_text(link.table_source(net.table, identity, ()))
    kernels = [folder / "kernels.c"]
    if idle:
        kernels[0].write_text("\n".join(["#include <stdint.h>", *map(idle_kernel, net.table), ""]))
    else:
        kernels = [folder / f"{i}.o" for i in range(len(net.table))]
        for file, entry in zip(kernels, net.table, strict=True):
            file.write_bytes(net.objects[entry.name])
    sources = [*(link.RUNTIME / name for name in link.SOURCES), HERE / driver, folder / "table.c", *kernels]
    command = [*compiler, *FLAGS, *sanitizers, f"-I{link.RUNTIME}", *map(str, sources), "-lm", "-pthread"]
    done = subprocess.run([*command, "-o", str(folder / "driver")], capture_output=True, text=True)
    if done.returncode and any(text in done.stderr for text in NO_SANITIZER):
        pytest.skip(f"{compiler[0]} has no sanitizers here")
    assert done.returncode == 0, done.stderr
    (folder / "plan").write_bytes(net.plan)
    (folder / "weights").write_bytes(net.weights)
    return [str(folder / name) for name in ("driver", "plan", "weights")]


def idle_kernel(entry: link.Entry) -> str:
    """C text of a kernel that does nothing, so that only the runtime is tested."""
    arguments = "".join(f"void *b{i}, " for i in range(entry.buffers))
    used = " ".join(f"(void)b{i};" for i in range(entry.buffers))
    head = f"int32_t {entry.name}({arguments}int32_t part, int32_t parts)"
    return f"{head}; {head} {{ {used} (void)part; (void)parts; return 0; }}"


@pytest.mark.parametrize(
    ("kind", "name"),
    [("address and undefined", "sample"), ("address and undefined", "network"), ("undefined", "sample")],
)
def test_no_case_crashes_and_each_says_why(kind, name, tmp_path):
    cases, (compiler, sanitizers) = CASES[name], COMPILERS[kind]
    fuzzer = build(tmp_path, compiler, [*sanitizers, *WRAPPED], "fuzz_plan.c", NETWORKS[name]())
    done = subprocess.run([*fuzzer, "1", str(cases)], capture_output=True, text=True, errors="replace", timeout=60)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert len(lines) == cases
    assert all(line.strip() for line in lines)
    seen = collections.Counter(re.sub(r"[0-9a-f]{8}\.\.\.|\d+", "N", line) for line in lines)
    assert cases // 20 < seen["opened"] < cases // 2
    assert len(seen) > 30, seen  # most of the checks were reached


def test_threads_do_not_race(tmp_path):
    command = build(tmp_path, ["gcc"], ["-fsanitize=thread"], "race_threads.c", sample_network(), idle=True)
    done = subprocess.run([*command, "1000"], capture_output=True, text=True, timeout=60)
    if any(text in done.stderr for text in NO_SANITIZER):
        pytest.skip("the thread sanitizer does not run on this kernel")
    assert done.returncode == 0, done.stderr[-4000:]
    assert not done.stderr
