"""Objects of the plane, list and dense kernels for every kind of target: what they call, and that they use vectors."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from dvexport.targets import catalogue
from dvexport.targets.tvm.build.compile import compile_kernel
from dvexport.targets.tvm.kernels import lists
from dvexport.targets.tvm.kernels.abi import Kernel
from dvexport.targets.tvm.kernels.planes import elementwise, planes, pooling
from dvexport.targets.tvm.kernels.tokens.dense import Dense, dense
from dvexport.targets.tvm.machine.machine import Machine, machine_of

TARGETS = ["x86-64-avx512", "x86-64-avx2", "raspberry-pi-4", "rv1126"]
VECTOR = {"x86-64-avx512": "zmm", "x86-64-avx2": "ymm", "raspberry-pi-4": ".4s"}
"""What a vector register is called in a disassembly."""

MOVES = [
    planes.load_frame,
    planes.store_planes,
    planes.zero_ends,
    planes.zero_pads,
    planes.merge,
    planes.merge_history,
    planes.merge_lines,
    elementwise.copy,
    elementwise.clear,
    elementwise.relu,
    elementwise.add,
    pooling.cell_mean,
    pooling.global_mean,
    lists.channels_from_mask,
    lists.channels_other_than,
    lists.cells_to_runs,
    lists.mask_from_tiles,
]


def kernels(machine: Machine) -> list[Kernel]:
    return [
        *(generator(machine) for generator in MOVES),
        pooling.max_pool((3, 3), 2, machine),
        pooling.avg_pool((2, 2), 2, machine),
        lists.touched_lines(1, machine),
        dense(Dense(2, relu=True), machine),
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_objects_call_nothing(target):
    machine = machine_of(catalogue.load(target).cpu)
    for kernel in kernels(machine):
        made = compile_kernel(kernel, machine)
        called = [name for name in (b"memcpy", b"memset", b"memmove", b"aeabi_l", b"aeabi_i") if name in made]
        assert not called, (kernel.name, called)
        assert len(made) < 60_000, kernel.name


@pytest.mark.skipif(shutil.which("llvm-objdump") is None, reason="needs llvm-objdump")
@pytest.mark.parametrize("target", VECTOR)
def test_arithmetic_is_on_vectors(target, tmp_path):
    machine = machine_of(catalogue.load(target).cpu)
    arithmetic = [elementwise.add, elementwise.relu, planes.merge, pooling.global_mean, pooling.cell_mean]
    made = [*(generator(machine) for generator in arithmetic), pooling.max_pool((3, 3), 2, machine)]
    for kernel in [*made, dense(Dense(2), machine)]:
        path = tmp_path / f"{kernel.name}.o"
        path.write_bytes(compile_kernel(kernel, machine))
        done = subprocess.run(["llvm-objdump", "-d", str(path)], check=True, capture_output=True, text=True)
        assert done.stdout.count(VECTOR[target]) >= 3, kernel.name  # a merge with masks: compare, load, store
