"""What kernels state that they touch: the guard that tests it, the plans that are held to it, both readers alike."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterable
from functools import cache

import numpy as np
import pytest
from native_harness import Callable, host_machine
from native_networks import variants
from oracle_check import FRAMES, traced
from runtime_plans import add, network, sample_kernels, sample_plan, sample_weights

from dvexport.errors import DeviceError
from dvexport.targets.tvm.build.link import kernel_table
from dvexport.targets.tvm.calls.memory import Constants
from dvexport.targets.tvm.calls.place import place
from dvexport.targets.tvm.calls.write import write_draft
from dvexport.targets.tvm.kernels import lists
from dvexport.targets.tvm.kernels.abi import Kernel
from dvexport.targets.tvm.kernels.bounds import (
    PARTS,
    Contract,
    ListKind,
    Refused,
    ceil,
    entry,
    evaluate,
    largest,
    least,
    most,
    rising,
    size,
)
from dvexport.targets.tvm.kernels.planes import elementwise
from dvexport.targets.tvm.plan import Place, Plan, Space
from dvexport.targets.tvm.plan_check import check_calls
from dvexport.targets.tvm.session import NativeSession


class _Numbers:
    """Entries for expressions."""

    parts = 4

    def __init__(self, *values: int) -> None:
        self._values = values

    def entries(self, buffer: str, first: int, count: int, step: int) -> list[int]:
        if first + (count - 1) * step >= len(self._values):
            raise Refused("too short")
        return [self._values[first + i * step] for i in range(count)]

    def of_list(self, buffer: str, what: str) -> int:
        return {"count": 3, "limit": 7, "inputs": 9}[what]


@pytest.mark.parametrize(
    ("expr", "value"),
    [
        (entry(1) * 2 + PARTS, 14),
        (3 + entry(0) - 100, 0),
        (ceil(entry(1), 2), 3),
        (most(entry(0), 2, 9) - least(4, entry(1)), 5),
        (largest(0, 2, 2), 8),
        (rising(0, 3), 8),
        (largest(3, 0), 0),
    ],
)
def test_an_expression_has_this_value(expr, value):
    assert evaluate(expr, _Numbers(3, 5, 8)) == value


@pytest.mark.parametrize(
    ("expr", "why"),
    [
        (entry(3), "too short"),
        (entry(4) * 0, "too short"),
        (entry(0) // entry(1), "zero"),
        (entry(2), "negative"),
        (rising(0, 2), "fall"),
        (size(1 << 40) * (1 << 40), "too large"),
        (size((1 << 64) - 1) + 1, "too large"),
    ],
)
def test_an_expression_is_refused(expr, why):
    with pytest.raises(Refused, match=why):
        evaluate(expr, _Numbers(3, 0, -1))


def test_memory_that_a_kernel_does_not_state_faults():
    """The guard of all other tests of kernels: one float farther, and the process ends."""
    copy = elementwise.copy(host_machine())
    assert copy.contract is not None
    stated = dict(copy.contract.buffers)
    less = dataclasses.replace(stated["Y"], elements=stated["Y"].elements - 1)
    wrong = dataclasses.replace(copy.contract, buffers=tuple((stated | {"Y": less}).items()))
    arrays = [_aligned(20), _ints([1, 20, 0, 0]), _aligned(20)]
    assert _signal_of(copy, arrays) == 0
    assert _signal_of(dataclasses.replace(copy, contract=wrong), arrays) == signal.SIGSEGV


def _aligned(count: int, values: np.ndarray | None = None) -> np.ndarray:
    memory = np.zeros(4 * count + 64, np.uint8)
    made = memory[-memory.ctypes.data % 64 :][: 4 * count].view(np.float32 if values is None else np.int32)
    made[:] = 0 if values is None else values
    return made


def _signal_of(kernel, arrays) -> int:
    """The signal that ends a process which runs a kernel; 0: none."""
    call = Callable(kernel)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        call(*arrays)
        os._exit(0)
    return os.waitpid(child, 0)[1] & 127


@pytest.mark.parametrize("value", [1, 2, 255])
def test_a_byte_that_is_no_bool_makes_no_list_longer(value):
    machine = host_machine()
    made = _ints([-1] * 6)
    Callable(lists.channels_from_mask(machine))(_bytes([0, value, 0, value, 0]), _ints([5, 0]), made)
    assert made[:3].tolist() == [2, 1, 3]


def _bytes(values: list[int]) -> np.ndarray:
    memory = _aligned(16).view(np.uint8)
    memory[: len(values)] = values
    return memory[: len(values)]


def _ints(values: list[int]) -> np.ndarray:
    return _aligned(len(values), np.array(values, np.int32))


@cache
def _gated() -> tuple[Plan, dict[str, Contract], memoryview]:
    """A plan with gates, what its kernels state, and its weights."""
    model, constants = variants(traced("bottleneck", "even"), "stream", FRAMES, ("gated",))["gated"], Constants()
    draft = write_draft(model, host_machine(), constants, threads=4)
    plan = place(draft).plan
    return plan, _contracts(draft.calls.kernels.values()), constants.file()


def _contracts(kernels: Iterable[Kernel]) -> dict[str, Contract]:
    return {entry.name: entry.contract for entry in kernel_table(kernels)}


def test_buffers_that_are_exported_are_large_enough_and_not_much_larger():
    """Scratch of a convolution over a whole plane was too small, where its vectors are more than those of the tiles."""
    plan, contracts, weights = _gated()
    touched = check_calls(plan, contracts, weights, plan.threads)
    assert len(touched) == sum(len(call.alternatives) for call in plan.calls)
    given = sum(place.size for call in plan.calls for way in call.alternatives for place in way.arguments)
    assert sum(map(sum, touched)) > given / 2


def test_more_threads_than_scratch_is_for_are_refused():
    plan, contracts, weights = _gated()
    with pytest.raises(AssertionError, match="bytes of scratch are touched"):
        check_calls(plan, contracts, weights, plan.threads + 1)


def test_both_readers_take_a_place_of_the_size_that_is_touched_and_no_smaller():
    plan, contracts, seen = sample_plan(), _contracts(sample_kernels()), 0
    ways = [(i, k) for i, call in enumerate(plan.calls) for k in range(len(call.alternatives))]
    touched = check_calls(plan, contracts, sample_weights(), plan.threads)
    for (call, way), sizes in zip(ways, touched, strict=True):
        stated = contracts[plan.calls[call].alternatives[way].kernel]
        made = {each.buffer for each in stated.makes}
        for argument, ((name, buffer), exact) in enumerate(zip(stated.buffers, sizes, strict=True)):
            if buffer.reads is ListKind.NONE and name not in made:  # a list has the size that it was written with
                assert _opens(call, way, argument, exact)
                assert not _opens(call, way, argument, exact - 1)
                seen += 1
    assert seen > 20


def _opens(call: int, variant: int, argument: int, given: int) -> bool:
    """Whether the sample plan opens with another size of an argument; Python and C must agree."""
    plan = sample_plan()
    ways = list(plan.calls[call].alternatives)
    places = list(ways[variant].arguments)
    places[argument] = dataclasses.replace(places[argument], size=given)
    ways[variant] = dataclasses.replace(ways[variant], arguments=tuple(places))
    plan.calls[call] = dataclasses.replace(plan.calls[call], alternatives=tuple(ways))
    contracts = _contracts(sample_kernels())
    try:
        check_calls(plan, contracts, sample_weights(), plan.threads)
        fits = True
    except AssertionError:
        fits = False
    assert fits == _opens_in_c(plan)
    return fits


def _opens_in_c(plan: Plan) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dvexport.targets.tvm.plan_file.check_calls", lambda *_: [])
        net = network(plan, sample_kernels(), sample_weights(), host_machine())
    try:
        NativeSession(net.library, net.plan, net.weights).close()
        why = ""
    except DeviceError as error:
        why = str(error)
    assert not why or "is too small" in why or "is too short" in why, why
    return not why


def test_a_kernel_that_states_nothing_gets_into_no_library():
    with pytest.raises(AssertionError, match="does not state what it touches"):
        kernel_table([dataclasses.replace(add(), contract=None)])


def test_a_list_is_forgotten_when_something_is_written_over_it():
    plan = sample_plan()
    contracts = _contracts(sample_kernels())
    rows = plan.calls[4].alternatives[0].arguments[2]
    over = dataclasses.replace(
        plan.calls[0].alternatives[0],
        arguments=(*plan.calls[0].alternatives[0].arguments[:2], Place(Space.ARENA, rows.offset, 800)),
    )
    plan.calls.insert(5, dataclasses.replace(plan.calls[0], alternatives=(over,)))
    with pytest.raises(AssertionError, match="a list is read that nothing has written"):
        check_calls(plan, contracts, sample_weights(), plan.threads)
