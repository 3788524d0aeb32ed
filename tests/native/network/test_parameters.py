"""What convolution kernels are generated with: defaults, what may be tried, and that measurements decide."""

from __future__ import annotations

from dataclasses import replace

import pytest
from native_harness import host_machine

from dvexport.targets import catalogue
from dvexport.targets.tvm.kernels.conv import direct, direct_data, winograd
from dvexport.targets.tvm.kernels.conv.direct_data import Window
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.machine.machine import Machine, machine_for
from dvexport.targets.tvm.machine.parameters import TALL, fits, parameters_of
from dvexport.targets.tvm.machine.rates import Parameters
from dvexport.targets.tvm.tuning import parameters
from dvexport.targets.tvm.tuning.parameters import candidates, choose_parameters
from dvexport.targets.tvm.tuning.workloads import Workload

COMPILED = [name for name in catalogue.names() if "tvm" in catalogue.load(name).runtimes]
OWN = Parameters((4, 4), (3, 5), 9, 0, (6, 4), "mine")
SMALL = (
    Workload(3, 1, 16, 16, 28, 7),
    Workload(3, 1, 16, 16, 28),
    Workload(3, 1, 16, 16, 8),
    Workload(1, 1, 32, 16, 14),
)


def machine(name: str = catalogue.HOST) -> Machine:
    return machine_for(catalogue.load(name))


@pytest.mark.parametrize("name", COMPILED)
def test_defaults_stay_in_registers(name: str) -> None:
    own = parameters_of(machine(name))
    for rows, vectors in (own.planes, own.packed, (own.tall or 1, TALL)):
        assert fits(rows, vectors, machine(name))
    assert own.tall == 0 or own.tall > own.packed[0]


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("parameter", OWN.values())
def test_candidates(name: str, parameter: str) -> None:
    """The present value first, no value twice, none that LLVM would have to spill."""
    own = parameters_of(machine(name))
    values = candidates(parameter, own, machine(name))
    assert values[0] == getattr(own, parameter)
    assert len(set(values)) == len(values)
    if parameter == "tall":
        blocks = [(rows, TALL) for rows in values if rows]
    elif parameter == "winograd":
        blocks = [(rows, count) for value in values[1:] for count, rows in enumerate(value, 1)]
    else:
        blocks = [] if parameter == "small_plane" else values
    assert all(fits(rows, vectors, machine(name)) for rows, vectors in blocks)
    assert len(values) > 1 or parameter == "tall"


def test_kernels_are_generated_with_a_targets_own() -> None:
    target = replace(machine(), parameters=OWN)
    square, plane = Window((3, 3), (1, 1), (1, 1)), Plane((28, 28))
    runs = direct_data.dense_runs(plane, plane, square, target)
    spec = direct.spec_for(square, runs, (32, 32), target, residual=False, relu=True)
    assert (spec.packed, spec.block) == (False, OWN.planes)
    packed = direct.spec_for(
        square, runs, (32, 32), replace(target, parameters=replace(OWN, small_plane=1 << 20)), residual=False, relu=True
    )
    assert (packed.packed, packed.block, packed.tall) == (True, OWN.packed, OWN.tall)
    tiled = winograd.spec_for(plane, plane, None, target, residual=False, relu=True)
    assert tiled is not None
    assert tiled.block == OWN.winograd


def choose(monkeypatch: pytest.MonkeyPatch, seconds) -> tuple[Parameters, list[str]]:
    """Choose where a kernel of `spec` takes `seconds(spec)`."""

    def timed(trials, _machine, _seconds, _tell):
        return [replace(trial.sample, seconds=seconds(trial.sample.spec)) for trial in trials]

    said: list[str] = []
    monkeypatch.setattr(parameters, "time_trials", timed)
    return choose_parameters(machine("x86-64-avx512"), 1.0, "measured: here", said.append, SMALL), said


def test_the_fastest_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parameter by the kernels that it makes, those before it as chosen."""

    def seconds(spec) -> float:
        if isinstance(spec, winograd.WinogradConv):
            return 1.0 if spec.block == (8, 8, 8) else 1.5
        return 1.0 if spec.block == ((5, 5) if spec.packed else (7, 3)) else 1.5

    chosen, said = choose(monkeypatch, seconds)
    assert (chosen.planes, chosen.packed, chosen.winograd) == ((7, 3), (5, 5), (8, 8, 8))
    assert chosen.source == "measured: here"
    assert any(line.startswith("planes: (8, 3) 1.000, (7, 3) 0.667") for line in said)


def test_what_is_hardly_faster_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    own = parameters_of(machine("x86-64-avx512"))
    present = {own.planes, own.packed, own.winograd}
    chosen, _ = choose(monkeypatch, lambda spec: 1.0 if spec.block in present else 0.985)
    assert chosen.values() == own.values()


def test_packing_is_chosen_by_the_size_of_the_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, _ = choose(monkeypatch, lambda spec: 0.5 if getattr(spec, "packed", False) else 1.0)
    assert chosen.small_plane == 1024


@pytest.mark.slow
def test_a_real_measurement() -> None:
    chosen = choose_parameters(host_machine(), 0.1, "measured: test", lambda _: None, SMALL[2:3])
    assert chosen.source == "measured: test"
    assert all(getattr(chosen, name) in candidates(name, chosen, host_machine()) for name in chosen.values())
