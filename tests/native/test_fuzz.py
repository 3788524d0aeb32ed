"""The runtime under sanitizers: damaged and hostile files give an error text and nothing else; threads don't race."""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runtime_plans import sample_network

from dvexport.targets.tvm import link

CASES = 4000
HERE = Path(__file__).parent
FLAGS = ["-O1", "-g", "-std=c11", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-fno-omit-frame-pointer"]

COMPILERS = {
    "address and undefined": (["gcc"], ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]),
    "undefined": ([sys.executable, "-m", "ziglang", "cc"], ["-fsanitize=undefined"]),  # it has no address sanitizer
}
NO_SANITIZER = ("cannot find", "unexpected memory mapping")
"""What a compiler says that lacks a sanitizer's library, and that library under a kernel it does not know."""


def build(folder: Path, compiler: list[str], sanitizers: list[str], driver: str) -> list[str]:
    """Build a driver around the runtime and kernels that do nothing; return its command, files included."""
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"{compiler[0]} is not installed")
    net = sample_network()
    identity = link.library_id(net.objects, net.table, net.machine)
    (folder / "table.c").write_text(link.table_source(net.table, identity, ()))
    (folder / "kernels.c").write_text("\n".join(["#include <stdint.h>", *map(idle_kernel, net.table), ""]))
    sources = [*(link.RUNTIME / name for name in link.SOURCES), HERE / driver, folder / "table.c", folder / "kernels.c"]
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


@pytest.mark.parametrize("kind", COMPILERS)
def test_no_case_crashes_and_each_says_why(kind, tmp_path):
    fuzzer = build(tmp_path, *COMPILERS[kind], "fuzz_plan.c")
    done = subprocess.run([*fuzzer, "1", str(CASES)], capture_output=True, text=True, errors="replace", timeout=60)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert len(lines) == CASES
    assert all(line.strip() for line in lines)
    seen = collections.Counter(re.sub(r"[0-9a-f]{8}\.\.\.|\d+", "N", line) for line in lines)
    assert CASES // 20 < seen["opened"] < CASES // 2
    assert len(seen) > 30, seen  # most of the checks were reached


def test_threads_do_not_race(tmp_path):
    command = build(tmp_path, ["gcc"], ["-fsanitize=thread"], "race_threads.c")
    done = subprocess.run([*command, "1000"], capture_output=True, text=True, timeout=60)
    if any(text in done.stderr for text in NO_SANITIZER):
        pytest.skip("the thread sanitizer does not run on this kernel")
    assert done.returncode == 0, done.stderr[-4000:]
    assert not done.stderr
