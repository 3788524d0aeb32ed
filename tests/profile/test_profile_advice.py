"""What a profile advises, and why."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sample_profile import make_result

from dvexport.passes.lowerings import KERNELS
from dvexport.profile.advice import advise, better_lowering, overhead_share
from dvexport.profile.result import (
    GateStep,
    NodeTime,
    ProfileResult,
    StepTimes,
)


@pytest.fixture(scope="module")
def result() -> ProfileResult:
    return make_result()


def _texts(result: ProfileResult, gate: str | None) -> str:
    return " ".join(advice.text for advice in advise(result) if advice.gate == gate)


def test_advice_names_the_gate_that_costs_more_than_it_saves(result: ProfileResult) -> None:
    advice = advise(result)
    costly = [item for item in advice if "costs" in item.text]
    assert [item.gate for item in costly] == ["layer4.1"]
    assert "0.26 ms" in costly[0].text
    assert "'masked' in place of 'tiles'" in costly[0].text  # its channels are denser than its tiles
    assert "38% of its time decides and moves data" in costly[0].text
    assert advice[0].severity == "warning"


def test_a_gate_of_kernels_has_no_lowering_to_change(result: ProfileResult) -> None:
    slow = replace(result.gates[0], lowering=KERNELS, median_ms=2.0, dense_median_ms=1.0)
    text = _texts(replace(result, gates=[slow], backend="tvm"), slow.gate)
    assert "1.00 ms a frame more than it saves" in text
    assert "kernels follow every decision already" in text
    assert "lowering" not in text


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({}, "--backend tvm"),
        ({"backend": "tvm"}, "train sparser decisions"),
        ({"gates": [], "tokens": [None]}, "drop more tokens"),
    ],
)
def test_advice_where_the_gated_artifact_is_slower(result: ProfileResult, change: dict, remedy: str) -> None:
    assert "is slower than" not in _texts(result, None)
    slower = replace(result, gated=result.dense, dense=result.gated, **change)
    assert slower.speedup is not None and slower.speedup < 1
    assert f"{slower.speedup:.2f}): {remedy}" in _texts(slower, None).replace("try ", "")


def test_advice_names_the_worst_gates_and_sums_up_the_rest(result: ProfileResult) -> None:
    low = [item for item in advise(result) if item.gate and "less than its FLOPs allow" in item.text]
    kept = [gate for gate in result.gates if gate.gate != "layer4.1"]
    worst = sorted(kept, key=lambda gate: gate.executed_fraction)[:3]
    assert [item.gate for item in low] == [gate.gate for gate in worst]
    rest = next(item for item in advise(result) if "The same holds" in item.text)
    assert rest.text.count("layer") == 4


def test_advice_on_flops_that_the_lowering_does_not_save(result: ProfileResult) -> None:
    gate = replace(result.gates[0], lowering="masked", reason="above break-even", median_ms=1.4)
    text = _texts(replace(result, gates=[gate]), gate.gate)
    assert "executes them all (above break-even)" in text
    assert "'tiles'" in text
    slower = replace(gate, median_ms=1.6)
    assert "--lowering GATE=tiles" in _texts(replace(result, gates=[slower]), gate.gate)


def test_better_lowering_follows_the_sparser_unit(result: ProfileResult) -> None:
    gate = result.gates[0]
    steps = [
        replace(step, gates={gate.gate: GateStep(0, 0, 64, 10, 49)}) for step in result.steps
    ]  # every channel, few tiles
    assert better_lowering(replace(result, steps=steps), replace(gate, lowering="groups")) == "tiles"
    assert better_lowering(replace(result, steps=steps), replace(gate, lowering="masked")) == "tiles"
    assert better_lowering(replace(result, steps=steps), replace(gate, lowering="tiles")) == "masked"


def test_better_lowering_follows_the_cost_table(result: ProfileResult) -> None:
    expected = {"masked": 0.9, "tiles": 0.5, "winograd4": 0.4}
    gate = replace(result.gates[0], lowering="winograd4", median_ms=0.8, expected_ms=expected)
    assert better_lowering(result, gate) == "tiles"
    assert better_lowering(result, replace(gate, median_ms=0.45)) == "winograd4"


def test_advice_on_gates_that_never_or_always_skip(result: ProfileResult) -> None:
    taken = {"layer1.0": GateStep(0, 0, 64, 49, 49), "layer1.1": GateStep(60, 4, 0, 20, 49)}
    taken["layer2.0"] = GateStep(0, 0, 128, 0, 49)
    steps = [replace(step, gates=step.gates | taken) for step in result.steps]
    constant = replace(result, steps=steps)
    assert "Never skips" in _texts(constant, "layer1.0")
    assert "Always skips" not in _texts(constant, "layer1.1")  # it reuses
    assert "Always skips" in _texts(constant, "layer2.0")
    assert "Never skips" not in _texts(replace(constant, forced={"tiles": 1.0}), "layer1.0")


def test_advice_on_a_measurement_that_is_not_reliable(result: ProfileResult) -> None:
    noisy = replace(
        result,
        dense=StepTimes(np.random.default_rng(1).uniform(8, 20, 200).tolist()),
        device=replace(result.device, governor="powersave", threads=4),
    )
    text = _texts(noisy, None)
    assert "not reliable" in text
    assert "'powersave'" in text
    assert "4 threads run on 4 cores" in text
    assert "not reliable" not in _texts(result, None)


def test_advice_on_slow_and_low_realisation(result: ProfileResult) -> None:
    assert "slower than the dense" in _texts(replace(result, dense=StepTimes([3.0] * 9)), None)
    low = replace(result, dense=StepTimes([result.gated.median * 1.1] * 9))
    assert "of the speed-up that the decisions allow arrives" in _texts(low, None)


def test_overhead_share_leaves_control_nodes_out(result: ProfileResult) -> None:
    nodes = [
        NodeTime("if", "If", "g", 1000.0),
        NodeTime("conv", "FusedConv", "g", 60.0),
        NodeTime("gather", "GatherND", "g", 30.0),
        NodeTime("policy", "Gemm", "g", 10.0, decides=True),
    ]
    assert overhead_share(replace(result, nodes=nodes), "g") == pytest.approx(0.4)
    assert overhead_share(result, "absent") is None


def test_advice_always_says_something(result: ProfileResult) -> None:
    ideal = result.gated.median * (result.flop_ratio or 0)
    good = replace(result, gates=[], nodes=[], dense=StepTimes([ideal] * 9))
    assert any("nothing stands out" in advice.text for advice in advise(good))
    assert all(advice.severity == "info" for advice in advise(good))
