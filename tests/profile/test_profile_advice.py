"""What a profile advises, and why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sample_profile import make_result

from dvexport.passes.lowerings import KERNELS
from dvexport.profile.advice import Advice, AdviceKind, advise
from dvexport.profile.gate_advice import better_lowering, overhead_share
from dvexport.profile.result import (
    GateStep,
    NodeTime,
    ProfileResult,
    StepTimes,
    write_json,
)
from dvexport.targets.registry import backend_of


@pytest.fixture(scope="module")
def result() -> ProfileResult:
    return make_result()


def _kinds(result: ProfileResult, gate: str | None) -> set[AdviceKind]:
    return {advice.kind for advice in advise(result) if advice.gate == gate}


def _advice(result: ProfileResult, kind: AdviceKind) -> Advice:
    """The only advice of a kind."""
    (found,) = (advice for advice in advise(result) if advice.kind is kind)
    return found


def test_advice_names_the_gate_that_costs_more_than_it_saves(result: ProfileResult) -> None:
    costly = _advice(result, AdviceKind.COSTLY)
    assert costly.gate == "layer4.1"
    assert costly.lowering == "masked"  # in place of 'tiles': its channels are denser than its tiles
    (gate,) = (gate for gate in result.gates if gate.gate == "layer4.1")
    assert gate.median_ms is not None and gate.dense_median_ms is not None
    assert f"{gate.median_ms - gate.dense_median_ms:.2f} ms" in costly.text
    assert overhead_share(result, "layer4.1") == pytest.approx(0.38, abs=0.005)
    assert costly.severity == advise(result)[0].severity == "warning"


def test_a_gate_of_kernels_has_no_lowering_to_change(result: ProfileResult) -> None:
    slow = replace(result.gates[0], lowering=KERNELS, median_ms=2.0, dense_median_ms=1.0)
    advice = _advice(replace(result, gates=[slow], backend="tvm"), AdviceKind.COSTLY)
    assert (advice.gate, advice.lowering) == (slow.gate, None)
    assert "--lowering" not in advice.act


@pytest.mark.parametrize("change", [{}, {"backend": "tvm"}, {"gates": [], "tokens": [None]}])
def test_advice_where_the_gated_artifact_is_slower(result: ProfileResult, change: dict) -> None:
    assert AdviceKind.SLOWER not in _kinds(result, None)
    slower = replace(result, gated=result.dense, dense=result.gated, **change)
    assert slower.speedup is not None and slower.speedup < 1
    remedy = "Drop more tokens" if "tokens" in change else backend_of(slower.backend).remedy
    assert remedy in _advice(slower, AdviceKind.SLOWER).act


def test_a_model_without_gates_is_not_called_slower_than_itself(result: ProfileResult) -> None:
    same = replace(result, gated=result.dense, dense=result.gated, gates=[], tokens=[])
    kinds = _kinds(same, None)
    assert AdviceKind.NO_GATES in kinds
    assert AdviceKind.SLOWER not in kinds


def test_the_remedy_is_the_backends() -> None:
    assert backend_of("onnx").remedy != backend_of("tvm").remedy


def test_advice_names_the_worst_gates_and_sums_up_the_rest(result: ProfileResult) -> None:
    by_group = replace(result, gates=[replace(gate, lowering="groups") for gate in result.gates])
    low = [item for item in advise(by_group) if item.kind is AdviceKind.LOSSY]
    assert {item.lowering for item in low[:-1]} == {"tiles"}  # which are sparser than the channels
    kept = [gate for gate in result.gates if gate.gate != "layer4.1"]
    worst = sorted(kept, key=lambda gate: gate.executed_fraction)
    assert [item.gate for item in low] == [*(gate.gate for gate in worst[:3]), None]
    assert [gate.gate for gate in worst[3:] if gate.gate not in low[-1].act] == []
    assert len(worst) == 7


def test_advice_on_flops_that_the_lowering_does_not_save(result: ProfileResult) -> None:
    gate = replace(result.gates[0], lowering="masked", reason="above break-even", median_ms=1.4)
    unused = _advice(replace(result, gates=[gate]), AdviceKind.UNUSED)
    assert (unused.gate, unused.lowering) == (gate.gate, "tiles")
    assert gate.reason in unused.text
    slower = replace(gate, median_ms=1.6)
    assert _advice(replace(result, gates=[slower]), AdviceKind.COSTLY).lowering == "tiles"


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
    assert AdviceKind.NEVER_SKIPS in _kinds(constant, "layer1.0")
    assert AdviceKind.ALWAYS_SKIPS not in _kinds(constant, "layer1.1")  # it reuses
    assert AdviceKind.ALWAYS_SKIPS in _kinds(constant, "layer2.0")
    assert AdviceKind.NEVER_SKIPS not in _kinds(replace(constant, forced={"tiles": 1.0}), "layer1.0")


def test_advice_on_a_measurement_that_is_not_reliable(result: ProfileResult) -> None:
    noisy = replace(
        result,
        dense=StepTimes(np.random.default_rng(1).uniform(8, 20, 200).tolist()),
        device=replace(result.device, governor="powersave", threads=4),
    )
    advice = _advice(noisy, AdviceKind.UNRELIABLE)
    assert "'powersave'" in advice.act
    assert "4 run on 4 cores" in advice.act
    assert "judged by its times" in advice.text
    by_time = {AdviceKind.COSTLY, AdviceKind.LOSSY}
    assert by_time & {one.kind for one in advise(result)}
    assert not by_time & {one.kind for one in advise(noisy)}  # said once, and not at every gate
    assert AdviceKind.UNRELIABLE not in _kinds(result, None)


def test_advice_on_slow_and_low_realisation(result: ProfileResult) -> None:
    assert AdviceKind.SLOWER in _kinds(replace(result, dense=StepTimes([3.0] * 9)), None)
    low = replace(result, dense=StepTimes([result.gated.median * 1.1] * 9))
    assert AdviceKind.LITTLE_ARRIVES in _kinds(low, None)


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
    assert [advice.kind for advice in advise(good) if advice.kind is AdviceKind.NOTHING] == [AdviceKind.NOTHING]
    assert all(advice.severity == "info" for advice in advise(good))


def test_advice_goes_into_json_by_kind(result: ProfileResult, tmp_path: Path) -> None:
    advice = advise(result)
    write_json(result, tmp_path / "p.json", [one.to_dict() for one in advice])
    found = json.loads((tmp_path / "p.json").read_text())["advice"]
    assert [(one["kind"], one["gate"], one["lowering"]) for one in found] == [
        (one.kind.value, one.gate, one.lowering) for one in advice
    ]
    assert ("gate-costs-more", "layer4.1", "masked") in {(one["kind"], one["gate"], one["lowering"]) for one in found}
    assert advise(ProfileResult.from_dict(json.loads((tmp_path / "p.json").read_text()))) == advice


def test_one_thread_on_one_core_is_not_too_many(result: ProfileResult) -> None:
    noise = StepTimes(np.random.default_rng(1).uniform(8, 20, 200).tolist())
    noisy = replace(result, dense=noise, device=replace(result.device, threads=1, cores=1))
    assert "threads" not in _advice(noisy, AdviceKind.UNRELIABLE).act


def test_advice_on_layers_of_no_gate(result: ProfileResult) -> None:
    assert AdviceKind.OUTSIDE not in _kinds(result, None)
    stem = [replace(result.nodes[0], median_us=7000.0), NodeTime("head/Gemm", "Gemm", None, 200.0), *result.nodes[1:]]
    found = _advice(replace(result, nodes=stem), AdviceKind.OUTSIDE)
    share = 7200 / (7200 + 845 * 8)
    assert f"{share:.0%} of a step (7.20 ms)" in found.text
    assert "stem/Conv (Conv, 7.00 ms)" in found.text
    assert AdviceKind.OUTSIDE not in _kinds(replace(result, nodes=stem, gates=[]), None)


def test_little_that_arrives_names_the_gate_that_loses_most(result: ProfileResult) -> None:
    low = replace(result, dense=StepTimes([result.gated.median * 1.1] * 9))
    assert "gate layer4.1" in _advice(low, AdviceKind.LITTLE_ARRIVES).act


def test_no_gate_is_told_of_that_nothing_can_be_done_about(result: ProfileResult) -> None:
    native = replace(result, gates=[replace(gate, lowering=KERNELS) for gate in result.gates], backend="tvm")
    assert AdviceKind.LOSSY not in {one.kind for one in advise(native)}


_PROFILES = {
    "plain": {},
    "forced": {"forced": {"tiles": 0.5}},
    "slower": {"dense": StepTimes([3.0] * 9)},
    "no dense": {"dense": None},
    "no gates": {"gates": [], "tokens": []},
    "noisy": {"dense": StepTimes([5.0, 9.0, 20.0] * 9)},
    "varied": {"gated": StepTimes([5.0, 9.0, 20.0] * 9)},
    "native": {"backend": "tvm"},
}


@pytest.mark.parametrize("name", _PROFILES)
def test_every_advice_has_an_act(result: ProfileResult, name: str) -> None:
    for one in advise(replace(result, **_PROFILES[name])):
        assert one.text.endswith((".", ")"))
        assert bool(one.act.endswith(".")) != (one.kind is AdviceKind.NOTHING)
