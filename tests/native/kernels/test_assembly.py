"""Inner loops of the kernels of convolutions and transformers, as LLVM writes them.

Vectors are multiplied and added, in registers throughout: a loop that keeps its register block in memory computes the
same numbers, three times slower.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import tvm

from dvexport.targets import catalogue
from dvexport.targets.tvm.build import compile
from dvexport.targets.tvm.kernels.abi import Kernel
from dvexport.targets.tvm.kernels.blocks import register_block
from dvexport.targets.tvm.kernels.conv import winograd
from dvexport.targets.tvm.kernels.conv.direct import direct_conv, spec_for
from dvexport.targets.tvm.kernels.conv.direct_data import Window, dense_runs, tile_runs
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.kernels.tokens.attention import Attention, attention, attention_spec
from dvexport.targets.tvm.kernels.tokens.matmul import MatMul, matmul
from dvexport.targets.tvm.kernels.tokens.window_attention import window_attention
from dvexport.targets.tvm.machine.machine import Machine, machine_of

pytestmark = pytest.mark.slow

TARGETS = {"raspberry-pi-4": r"\bfmla\s+v\d+\.4s", "x86-64-avx512": r"\bvfn?madd\d+ps\b.*%zmm"}
"""A whole vector's multiply-add, by target."""

STACK = r"\[sp\b|\(%rsp\b"
SPILL = rf"(?:%[xyz]mm|\b[qvd]\d+\b).*(?:{STACK})|(?:{STACK}).*%[xyz]mm"
"""A vector kept in memory. With 16 address registers, x86-64 keeps an address there now and then."""

WINDOWS = {
    "1x1": Window((1, 1), (1, 1), (0, 0)),
    "3x3": Window((3, 3), (1, 1), (1, 1)),
    "3x3 s2": Window((3, 3), (2, 2), (1, 1)),
    "7x7 s2": Window((7, 7), (2, 2), (3, 3)),
}
LAYERS = [
    ("1x1", 56, None), ("3x3", 56, None), ("3x3", 28, (7, 7)), ("3x3 s2", 28, (7, 7)), ("7x7 s2", 112, None),
]  # fmt: skip
"""Window, edge of the output in pixels, tile grid."""


def machine(target: str) -> Machine:
    return machine_of(catalogue.load(target).cpu)


def direct_kernel(name: str, edge: int, grid: tuple[int, int] | None, on: Machine) -> Kernel:
    window = WINDOWS[name]
    x, y = (Plane((edge * scale,) * 2, max(*window.pads, 1)) for scale in (window.strides[0], 1))
    runs = dense_runs(x, y, window, on) if grid is None else tile_runs(x, y, window, grid, on)
    return direct_conv(spec_for(window, runs, (64, 64), on, residual=True, relu=True), on)


def winograd_kernel(edge: int, grid: tuple[int, int] | None, on: Machine) -> Kernel:
    plane = Plane((edge, edge))
    spec = winograd.spec_for(plane, plane, grid, on, residual=True, relu=True)
    assert spec is not None
    return winograd.winograd_conv(spec, on)


_MADE: dict[tuple[str, str], str] = {}
"""Assembly by kernel and target: a kernel's name says all that its text depends on."""


def _assembly(kernel: Kernel, target: str) -> str:
    key = kernel.name, target
    if key not in _MADE:
        module = tvm.IRModule({kernel.name: kernel.func})
        _MADE[key] = compile._generate(module, tvm.target.Target(machine(target).tvm_target)).inspect_source("asm")
    return _MADE[key]


def inner_loops(kernel: Kernel, target: str) -> list[list[str]]:
    """Instructions of the loops that hold no other loop."""
    lines = [line.strip() for line in _assembly(kernel, target).splitlines()]
    lines = [line for line in lines if re.match(r"[a-z]|\.L\w+:", line)]
    labels = {line.partition(":")[0]: i for i, line in enumerate(lines) if line.startswith(".L")}
    loops = []
    for i, line in enumerate(lines):
        jump = re.match(r"(?:b|b\.\w+|cbn?z|tbn?z|j\w+)\s.*?(\.L\w+)$", line)
        if jump and labels.get(jump[1], i) < i:
            loops.append((labels[jump[1]], i))
    inner = [loop for loop in loops if not any(loop != o and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)]
    return [[line for line in lines[start : stop + 1] if not line.startswith(".L")] for start, stop in inner]


def products(kernel: Kernel, target: str) -> list[list[str]]:
    """The loops that are mostly multiply-adds of vectors: the register blocks."""
    loops = inner_loops(kernel, target)
    return [loop for loop in loops if len(multiplies(loop, target)) >= max(4, 0.4 * len(loop))]


def multiplies(loop: list[str], target: str) -> list[str]:
    return [line for line in loop if re.search(TARGETS[target], line)]


def assert_in_registers(kernel: Kernel, target: str, least: int, addresses: float = 1 / 8) -> None:
    """Check the register blocks; at most a share of `addresses` of their lines may read an address from the stack."""
    blocks = products(kernel, target)
    assert blocks, f"no loop of {kernel.name} multiplies vectors"
    largest = max(blocks, key=lambda loop: len(multiplies(loop, target)))
    assert len(multiplies(largest, target)) >= least
    for loop in blocks:
        assert not [line for line in loop if re.search(SPILL, line)], "\n".join(loop)
        assert sum(bool(re.search(STACK, line)) for line in loop) <= max(4, len(loop) * addresses), "\n".join(loop)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "edge", "grid"), LAYERS)
def test_direct(target, name, edge, grid, request):
    """At least the rows x vectors of the register block in one turn of the loop."""
    if (target, name, grid) == ("x86-64-avx512", "3x3", None):
        request.applymarker(pytest.mark.xfail(strict=True, reason="LLVM stores vectors of the nine taps in the loop"))
    on = machine(target)
    assert_in_registers(direct_kernel(name, edge, grid, on), target, on.block[0] * on.block[1])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("edge", "grid"), [(56, None), (28, (7, 7))])
def test_winograd(target, edge, grid):
    """The loop over input channels; transforms have as many sums and moves as products, and are not looked at."""
    assert_in_registers(winograd_kernel(edge, grid, machine(target)), target, 12)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("spec", [MatMul(), MatMul("relu"), MatMul("gelu", residual=True)], ids=lambda spec: spec.name)
def test_matmul(target, spec):
    """The loop over the depth, in all numbers of rows that a block can have."""
    on = machine(target)
    rows, vectors = register_block(on)
    assert_in_registers(matmul(spec, on), target, rows * vectors)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["attention", "attention with a bias", "window attention", "product"])
def test_attention(target, kind):
    """Scores, and weights times values: heads of 64, as ViTs have, and of 32, as Video-Swin.

    Rows lie apart by strides of run time, for which x86-64 has too few address registers in blocks of many rows.
    """
    on = machine(target)
    kernel = {
        "attention": lambda: attention(attention_spec(64, 0, on), on),
        "attention with a bias": lambda: attention(attention_spec(64, 1, on), on),
        "window attention": lambda: window_attention(attention_spec(32, 3, on), on),
        "product": lambda: attention(Attention(1, softmax=False), on),
    }[kind]()
    rows, vectors = register_block(on)
    assert_in_registers(kernel, target, rows * vectors, addresses=1 / 4)


def test_a_spilling_loop_is_found():
    """The check itself: a block of more rows than there are registers has to keep some of them in memory."""
    on = machine("raspberry-pi-4")
    window, plane = WINDOWS["3x3"], Plane((56, 56))
    runs = dense_runs(plane, plane, window, on)
    spec = spec_for(window, runs, (64, 64), on, residual=True, relu=True)
    kernel = direct_conv(replace(spec, block=(9, 4)), on)
    loops = inner_loops(kernel, "raspberry-pi-4")
    busiest = max(loops, key=lambda loop: len(multiplies(loop, "raspberry-pi-4")))
    assert [line for line in busiest if re.search(SPILL, line)]
