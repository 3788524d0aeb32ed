"""Cost models: what they predict, and that a measurement finds the rates behind it."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from native_harness import host_machine

from dvexport.targets import catalogue
from dvexport.targets.tvm.calls import costs
from dvexport.targets.tvm.calls.costs import TileVectors
from dvexport.targets.tvm.kernels.conv.direct import DirectConv
from dvexport.targets.tvm.kernels.conv.winograd import WinogradConv
from dvexport.targets.tvm.machine.machine import machine_for, machine_of
from dvexport.targets.tvm.machine.rates import Rates, TypedRates
from dvexport.targets.tvm.tuning.fit import fit, non_negative_least_squares
from dvexport.targets.tvm.tuning.measure import Sample, measure
from dvexport.targets.tvm.tuning.workloads import Workload, draw_works

COUNTS = [(1, 1, 1), (5, 64, 3), (64, 17, 40), (512, 512, 200)]
SMALL = (Workload(3, 1, 16, 16, 8, 4), Workload(1, 1, 32, 16, 8, None, residual=True))


def known_rates() -> Rates:
    """Rates that differ all, of the size of real ones."""
    values = np.random.default_rng(5).uniform(0.1, 3.0, len(Rates.names()))
    return Rates(**{**dict(zip(Rates.names(), values.tolist(), strict=True)), "call": 900.0}, source="known")


def machine(rates: Rates | None = None):
    """A machine with 16 lanes."""
    typed = None if rates is None else TypedRates(f32=rates)
    return dataclasses.replace(machine_of(catalogue.load("x86-64-avx512").cpu), rates=typed)


def families() -> list[tuple[DirectConv | WinogradConv, int]]:
    """Kernels that together use every rate, with the pixels of their windows."""
    windows = [(0, 9, True), (1, 1, True), (9, 9, False)]
    direct = [
        (DirectConv(taps, 1, run, False, residual, True, packed, (8, 2)), pixels)
        for (taps, pixels, packed), run, residual in itertools.product(windows, (2, 4, 16), (False, True))
    ]
    return [
        *direct,
        *((WinogradConv(m, False, residual, True, (8, 8)), 9) for m in (2, 4) for residual in (False, True)),
    ]


def synthetic(rates: Rates, spread: float = 0.0) -> list[Sample]:
    """Samples whose times are what `rates` predict, but for a random error of `spread`."""
    rng, samples = np.random.default_rng(0), []
    for spec, taps in families():
        for _ in range(20):
            counts = tuple(int(count) for count in np.exp(rng.uniform(0, np.log((512, 512, 200)))))
            sample = Sample(len(samples), spec, taps, TileVectors(0.0625, 0.5), 512, counts)
            expected = costs.evaluate(sample.cost(machine(rates)), *counts)
            seconds = expected * 1e-9 * float(np.exp(rng.normal(0, spread)))
            samples.append(dataclasses.replace(sample, seconds=seconds))
    return samples


def test_evaluate_is_the_sum_of_eight_terms_and_of_the_wait_for_weights():
    terms = tuple(float(10**k) for k in range(8))
    a, b, c = 2, 3, 5
    assert costs.evaluate((*terms, 0.0, 1.0), a, b, c) == 1 + 20 + 300 + 5000 + 6e4 + 10e5 + 15e6 + 30e7
    none = (0.0,) * 8
    assert costs.evaluate((*none, 7.0, 1e9), a, b, c) == a * b * 7
    assert costs.evaluate((*none, 7.0, 20.0), a, b, c) == a * 20


@pytest.mark.parametrize("given", list(itertools.product((False, True), repeat=3)))
def test_counts_that_are_fixed_may_be_counted_as_one(given):
    cost = tuple(np.random.default_rng(1).random(10).tolist())
    for counts in COUNTS:
        known = [count if is_given else None for count, is_given in zip(counts, given, strict=True)]
        left = [1 if is_given else count for count, is_given in zip(counts, given, strict=True)]
        folded = costs.fixed(cost, *known)
        assert costs.evaluate(folded, *left) == pytest.approx(costs.evaluate(cost, *counts))
        assert costs.evaluate(folded, 0, 0, 0) == folded[0]
        assert len(folded) == len(cost)


@pytest.mark.parametrize(("spec", "taps"), families())
def test_more_work_never_costs_less(spec, taps):
    cost = Sample(0, spec, taps, TileVectors(0.0625, 0.5), 512, (1, 1, 1)).cost(machine())
    assert all(term >= 0 for term in cost)
    assert cost[0] > 0
    assert cost[7] > 0


def test_a_residual_and_short_runs_cost_more():
    def expected(run: int, residual: bool) -> float:
        spec = DirectConv(0, 1, run, False, residual, True, True, (8, 2))
        return costs.evaluate(costs.direct_cost(spec, 9, 64, machine()), 64, 64, 50)

    assert expected(16, False) < expected(4, False) < expected(1, False)
    assert expected(16, False) < expected(16, True)


def test_tiles_of_a_whole_image_are_counted_exactly():
    assert costs.tile_vectors([49], 50, 16) == TileVectors(4 / 50)


@pytest.mark.parametrize(
    ("tiles", "vectors"), [([4] * 49, 196), ([1] * 49, 49), ([1] * 16, 14), ([2, 1, 2, 1], 5), ([1, 1], 2)]
)
def test_tiles_of_cells_are_counted_closely(tiles, vectors):
    made, lanes = costs.tile_vectors(tiles, vectors, 16), 16
    total, step = sum(tiles), min(tiles)
    exact = {count: -(-count // lanes) for count in range(step, total + 1, step)}
    errors = [(made.per * vectors * count / total + made.spare) / exact[count] - 1 for count in exact]
    assert made.per >= 0
    assert max(map(abs, errors)) < 0.5
    assert abs(np.mean(errors)) < 0.1
    if total <= lanes:  # one vector, whatever is active
        assert made.per == pytest.approx(0, abs=1e-9)
        assert made.spare == pytest.approx(1)


def test_least_squares_without_negative_values():
    rng = np.random.default_rng(2)
    matrix, x = rng.random((50, 6)), np.array([3.0, 0, 0.01, 200, 0, 1])
    assert non_negative_least_squares(matrix, matrix @ x) == pytest.approx(x, abs=1e-3)
    wanted = matrix @ x - 40 * matrix[:, 1]  # the best value of the second unknown is negative
    found = non_negative_least_squares(matrix, wanted)
    slope = matrix.T @ (matrix @ found - wanted)
    assert found[1] == 0
    assert (found >= 0).all()
    assert slope[found == 0].min() > -1e-3  # Karush-Kuhn-Tucker: no step that is allowed improves
    assert slope[found > 0] == pytest.approx(0, abs=1e-3)


def test_a_fit_finds_the_rates():
    rates = known_rates()
    made = fit(synthetic(rates), machine(), "test")
    assert made.rates.source == "test"
    assert made.median < 0.01
    assert made.ninth < 0.02
    assert made.rates.tile_product == pytest.approx(rates.tile_product, rel=0.05)
    assert made.rates.call == pytest.approx(rates.call, rel=0.05)


def test_a_fit_is_not_led_astray():
    rates, rng = known_rates(), np.random.default_rng(3)
    samples = synthetic(rates, spread=0.05)
    for index in rng.choice(len(samples), len(samples) // 20, replace=False):  # something else ran meanwhile
        samples[index] = dataclasses.replace(samples[index], seconds=samples[index].seconds * 10)
    made = fit(samples, machine(), "test")
    assert made.median < 0.08
    assert made.rates.tile_product == pytest.approx(rates.tile_product, rel=0.15)


def test_choices_are_judged_by_the_faster_kernel():
    rates = known_rates()
    samples = synthetic(rates)
    pairs = [dataclasses.replace(sample, work=index // 2) for index, sample in enumerate(samples)]
    made = fit(pairs, machine(), "test")
    assert made.choices == len(pairs) // 2
    assert made.right >= 0.95 * made.choices
    assert 0 <= made.lost < 0.01


def test_rates_of_a_target_reach_its_machine():
    target = catalogue.load("x86-64-avx512")
    measured = target.runtimes["tvm"].rates.f32
    assert measured.source.startswith("measured")
    assert costs.rates_of(machine_for(target)) == measured


@pytest.mark.parametrize("name", ["raspberry-pi-4", "rv1126", "x86-64-avx2"])
def test_rates_of_other_targets_are_estimated_from_their_peak(name):
    target = catalogue.load(name)
    rates = costs.rates_of(machine_for(target))
    assert rates.source.startswith("estimated")
    lanes, peak = target.cpu.lanes, target.peak_gflops_per_core.value
    assert rates.product == pytest.approx(2 * lanes / peak)  # a vector's multiply-adds, two operations a lane
    assert all(value >= 0 for value in rates.values().values())


def test_works_are_drawn_from_all_to_few():
    layer = SMALL[0]
    works = draw_works([layer], 40)
    assert (len(works[0].rows), len(works[0].columns), works[0].cells.sum()) == (16, 16, 16)
    assert {len(work.rows) for work in works} >= {1, 16}
    assert all((np.diff(work.rows) > 0).all() and 1 <= work.cells.sum() <= 16 for work in works)


@pytest.mark.slow
def test_a_real_measurement():
    works, said = draw_works(SMALL, 6), []
    samples = measure(host_machine(), works, 0.2, said.append)
    assert said[0] == "write kernels"
    assert {sample.work for sample in samples} == set(range(12))
    assert sum(isinstance(sample.spec, WinogradConv) for sample in samples) == 6
    assert all(0 < sample.seconds < np.inf for sample in samples)
    made = fit(samples, host_machine(), "test")
    assert made.choices == 6
    assert made.median < 0.5
