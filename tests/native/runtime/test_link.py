"""What is linked: libraries and runners for every target, what they hold, need and show."""

from __future__ import annotations

import dataclasses
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from runtime_plans import (
    CHANNELS,
    EXAMPLE_TARGETS,
    add,
    frames,
    relu,
    sample_network,
    slow_once,
)

from dvexport.errors import DeviceError
from dvexport.targets.tvm.build import compile, link
from dvexport.targets.tvm.build.compile import compile_kernel

CODE_LIMIT = 100_000
"""Bytes of code and data that the runtime may have (issue 3)."""


def test_equal_input_gives_equal_bytes_without_paths(monkeypatch):
    net = sample_network()
    runner = link.link_runner(net.objects, net.table, net.machine)
    monkeypatch.setattr(link, "cached", lambda _kind, _key, make: make())
    assert link.link_library(net.objects, net.table, net.machine) == net.library
    assert link.link_runner(net.objects, net.table, net.machine) == runner
    for text in (tempfile.gettempdir(), str(Path.home()), str(Path(link.__file__).parents[2]), sys.prefix):
        for data in (net.library, runner):
            assert text.encode() + b"/" not in data


def test_the_library_shows_only_its_interface():
    net = sample_network()
    names = {name.decode() for name in re.findall(rb"\bdvx_\w+\b", net.library)}
    declared = set(re.findall(r"DVX_API [^;]*?\b(dvx_\w+)\(", (link.RUNTIME / "dvx.h").read_text()))
    assert declared and declared <= names
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "library.so"
        path.write_bytes(net.library)
        nm = shutil.which("nm")
        if nm is None:
            pytest.skip("nm is not installed")
        listed = subprocess.run([nm, "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1].partition("@")[0] for line in listed.splitlines()} == declared


def test_the_identity_follows_kernels_and_machine():
    net = sample_network()
    base = link.library_id(net.objects, net.table, net.machine)
    changed = {**net.objects, "relu": net.objects["relu"] + b"\0"}
    other = dataclasses.replace(net.table[0], splits=not net.table[0].splits)
    assert base == link.library_id(net.objects, net.table, net.machine)
    assert base != link.library_id(changed, net.table, net.machine)
    assert base != link.library_id(net.objects, [other, *net.table[1:]], net.machine)
    assert base != link.library_id(net.objects, net.table, dataclasses.replace(net.machine, mcpu="x86-64-v2"))


def test_features_are_known_to_the_runtime():
    text = (link.RUNTIME / "cpu.c").read_text()
    known = set(re.findall(r'\{"([a-z0-9.-]+)",', text))
    assert known == {name for names in link._FEATURES.values() for name in names}
    assert {"avx512f", "fma", "avx2"} <= set(link.required_features(sample_network("x86-64-avx512").machine))
    assert link.required_features(sample_network("raspberry-pi-4").machine) == ("neon",)
    assert {"lse", "dotprod"} <= set(link.required_features(sample_network("android-arm64").machine))
    assert {"neon", "vfp4"} <= set(link.required_features(sample_network("rv1126").machine))


def test_missing_packages_are_named(monkeypatch):
    net = sample_network()
    monkeypatch.setattr(compile.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"pip install 'dvexport\[tvm\]'"):
        link.link_library(net.objects, net.table, net.machine)


def test_a_kernel_that_calls_what_is_not_there():
    net = sample_network()
    table = [*net.table, link.Entry("not_there", 2, False, net.table[0].contract)]
    elsewhere = compile_kernel(add("elsewhere"), net.machine)
    with pytest.raises(DeviceError, match="not_there"):
        link.link_library({**net.objects, "not_there": elsewhere}, table, net.machine)


@slow_once
def test_android_needs_only_what_android_has():
    net = sample_network("android-arm64")
    library = link.link_library(net.objects, net.table, net.machine)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "library.so"
        path.write_bytes(library)
        if (readelf := shutil.which("readelf")) is None:
            pytest.skip("readelf is not installed")
        text = subprocess.run([readelf, "-dW", "--dyn-syms", path], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"NEEDED.*\[(.*)\]", text)) <= {"libc.so", "libm.so"}
    undefined = set(re.findall(r" UND (\w+)", text))
    assert "pthread_create" in undefined
    assert undefined <= set(link._ANDROID_LIBC) | set(link._ANDROID_LIBM)
    assert {"dvx_open", "dvx_step"} <= set(re.findall(r"DEFAULT +\d+ (\w+)", text))


def test_the_example_of_the_header_works(tmp_path):
    header = (link.RUNTIME / "dvx.h").read_text()
    body = "\n".join(line.removeprefix(" *") for line in header.splitlines() if line.startswith(" *     "))
    program = "\n".join(
        [
            '#include <stdio.h>\n#include "dvx.h"',
            f"static float frame[{CHANNELS}];",
            "static int read_frame(float *to) { return fread(to, sizeof frame, 1, stdin) == 1; }",
            "int main(void) {",
            body.replace("dvx_output_data(net, 0);", 'dvx_output_data(net, 0); printf("%.9g\\n", logits[7]);'),
            "return 0; }\n",
        ]
    )
    net, given = sample_network(), frames(5)
    for name, data in {"libnet.so": net.library, "model.plan": net.plan, "model.weights": net.weights}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "main.c").write_text(program)
    compiler = [sys.executable, "-m", "ziglang", "cc", "-Wall", "-Wextra", "-Werror", f"-I{link.RUNTIME}"]
    command = [*compiler, "main.c", "-o", "main", "-L.", "-lnet", "-Wl,-rpath,$ORIGIN"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "main"], cwd=tmp_path, input=given.tobytes(), capture_output=True, check=True)
    np.testing.assert_allclose([float(line) for line in done.stdout.split()], np.maximum(given[:, 0, 7], 0), rtol=1e-6)


@slow_once
@pytest.mark.parametrize("target", ["x86-64-avx512", *EXAMPLE_TARGETS])
def test_the_runtime_is_small(target):
    net = sample_network(target)
    alone = [relu()]
    objects = {"relu": net.objects["relu"]}
    runner = link.link_runner(objects, link.kernel_table(alone), net.machine)
    assert len(runner) < CODE_LIMIT
    assert sum(loaded_bytes(runner)) < CODE_LIMIT
    assert loaded_bytes(link.link_library(objects, link.kernel_table(alone), net.machine))[0] < CODE_LIMIT // 3


def loaded_bytes(elf: bytes) -> tuple[int, int]:
    """Bytes in the file of (read-only, writable) loaded segments: code and constants, data."""
    is_64 = elf[4] == 2
    start, size, count = (
        (struct.unpack_from("<Q", elf, 32)[0], *struct.unpack_from("<HH", elf, 54))
        if is_64
        else (struct.unpack_from("<I", elf, 28)[0], *struct.unpack_from("<HH", elf, 42))
    )
    totals = [0, 0]
    for i in range(count):
        at = start + i * size
        kind = struct.unpack_from("<I", elf, at)[0]
        flags = struct.unpack_from("<I", elf, at + (4 if is_64 else 24))[0]
        in_file = struct.unpack_from("<Q", elf, at + 32)[0] if is_64 else struct.unpack_from("<I", elf, at + 16)[0]
        if kind == 1:
            totals[flags >> 1 & 1] += in_file
    return totals[0], totals[1]
