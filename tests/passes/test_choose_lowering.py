"""Choices and their reasons: measured costs, break-even, abilities, overrides."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from graphs import graph, weights

from dvexport.errors import UsageError
from dvexport.passes.choose_lowering import ChooseLowering
from dvexport.passes.lowerings import Abilities, ConvShape, CostTable, Shares, lowering_of


@dataclass(frozen=True)
class Point:
    kernel: str
    size: str | list[int]
    ms: float
    threads: int = 1


SHAPE = [8, 8, 16, 3, 1, 4]


def curve(kernel, *points, shape=SHAPE):
    return [Point(kernel, [*shape, percent], ms) for percent, ms in points]


def gate(tiles="bool[1,4,4] t", size=16, action=True, frames=1, history=False):
    inputs = ["a" if action else "", "t" if tiles else ""] + ["", "h"] * history
    head = [f"float[{frames},8,{size},{size}] x", "float[8,8,3,3] W"]
    head += [f"int64[{frames},8] a"] * action + ([tiles] if tiles else [])
    head += [f"float[1,8,{size},{size}] h"] * history
    text = f"g ({', '.join(head)}) => (float[{frames},8,{size},{size}] y) {{"
    text += f' u = dv.GatedConv<gate="g", pads=[1,1,1,1]>(x, W, , {", ".join(inputs)}) y = Relu(u) }}'
    return graph(text, W=weights(8, 8, 3))


def choose(model, *, abilities=None, costs=None, rates=None, overrides=None):
    chooser = ChooseLowering(abilities or Abilities(), costs, rates, overrides)
    chooser(model)
    (choice,) = chooser.choices
    (node,) = (n for n in model.graph if n.domain == "dv")
    assert lowering_of(node) == choice.lowering
    return choice


@pytest.mark.parametrize(("rate", "ms"), [(0.0, 1.0), (0.25, 2.0), (0.5, 3.0), (0.75, 6.0), (1.0, 9.0)])
def test_costs_are_interpolated(rate, ms):
    table = CostTable(curve("tiles", (100, 9.0), (0, 1.0), (50, 3.0)))
    assert table.expected("tiles", ConvShape(*SHAPE), rate) == pytest.approx(ms)


def test_rates_outside_what_was_measured_take_the_nearest():
    table = CostTable(curve("tiles", (25, 2.0), (75, 6.0)))
    assert table.expected("tiles", ConvShape(*SHAPE), 0.0) == pytest.approx(2.0)
    assert table.expected("tiles", ConvShape(*SHAPE), 1.0) == pytest.approx(6.0)


def test_the_nearest_shape_is_scaled_by_macs():
    small, large = SHAPE, [64, 64, 16, 3, 1, 4]
    table = CostTable(curve("tiles", (100, 1.0), shape=small) + curve("tiles", (100, 10.0), shape=large))
    assert table.expected("tiles", ConvShape(16, 8, 16, 3, 1, 4), 1.0) == pytest.approx(2.0)
    assert table.expected("tiles", ConvShape(64, 32, 16, 3, 1, 4), 1.0) == pytest.approx(5.0)
    other_kernel = CostTable(
        curve("tiles", (100, 1.0), shape=small) + curve("tiles", (100, 7.0), shape=[64, 64, 16, 1, 1, 4])
    )
    assert other_kernel.expected("tiles", ConvShape(32, 32, 16, 1, 1, 4), 1.0) == pytest.approx(7.0 / 4)


def test_other_points_are_left_alone():
    odd = [Point("tiles", "8x8", 1.0), Point("tiles", [1, 2], 1.0), Point("tiles", [*SHAPE, 50], 1.0, threads=2)]
    assert CostTable(odd).expected("tiles", ConvShape(*SHAPE), 0.5) is None
    assert CostTable(odd, threads=2).expected("tiles", ConvShape(*SHAPE), 0.5) == 1.0


COSTS = curve("masked", (0, 4.0), (100, 4.0)) + curve("tiles", (0, 1.0), (100, 9.0))


@pytest.mark.parametrize(("rate", "lowering"), [(0.1, "tiles"), (0.35, "tiles"), (0.4, "masked"), (0.9, "masked")])
def test_break_even(rate, lowering):
    choice = choose(gate(), costs=CostTable(COSTS), rates={"g": Shares(tiles=rate)})
    assert choice.lowering == lowering
    assert choice.expected_ms == pytest.approx({"masked": 4.0, "tiles": 1 + 8 * rate})
    assert f"calibrated: {rate:.0%} of tiles" in choice.reason
    assert ("every other lowering costs more than it saves" in choice.reason) == (lowering == "masked")


@pytest.mark.parametrize(("owed", "ms"), [(0.0, 2.6), (0.25, 4.6)])
def test_what_a_history_owes_is_added_without_its_fixed_cost(owed, ms):
    choice = choose(gate(history=True), costs=CostTable(COSTS), rates={"g": Shares(tiles=0.2, owed=owed)})
    assert choice.expected_ms == pytest.approx({"masked": 4.0, "tiles": ms})


def test_assumed_rates_are_called_so():
    choice = choose(gate(), costs=CostTable(COSTS))
    assert "(assumed: 50% of tiles" in choice.reason
    assert choice.lowering == "masked"  # 5 ms against 4


def test_channels_follow_their_own_rate():
    costs = CostTable(curve("masked", (0, 4.0)) + curve("channels", (0, 0.0), (100, 10.0)))
    assert choose(gate(), costs=costs, rates={"g": Shares(compute=0.2)}).lowering == "channels"
    assert choose(gate(), costs=costs, rates={"g": Shares(compute=0.6)}).lowering == "masked"


@pytest.mark.parametrize("costs", [None, CostTable([]), CostTable(curve("tiles", (50, 1.0)))])
def test_without_costs_the_usual_best_is_taken_and_said(costs):
    choice = choose(gate(), costs=costs)
    assert (choice.lowering, choice.reason) == ("winograd4", "no measured costs for this target: the usual best")


@pytest.mark.parametrize(
    ("model", "abilities", "asked", "why"),
    [
        ({"tiles": ""}, {}, "tiles", "the gate has no tile mask"),
        ({"action": False}, {}, "channels", "the gate has no channel actions"),
        ({"frames": 4, "tiles": "bool[4,4,4] t"}, {}, "groups", "frames of a clip choose different channels"),
        ({"tiles": "bool[1,17,4] t"}, {}, "tiles", "a grid of 17 x 4 is finer than its plane of 16 x 16"),
        ({"tiles": "bool[1,8,8] t"}, {}, "winograd4", "no 3x3 convolution of stride 1 has even tiles that 4 divides"),
        ({"tiles": "bool[1,3,4] t"}, {}, "winograd2", "no 3x3 convolution of stride 1 has even tiles that 2 divides"),
        ({}, {"conditional": "eager"}, "groups", "the target runs both branches of a conditional"),
        ({}, {"dynamic_shapes": False}, "tiles", "the target's runtime has no sizes known only at run time"),
        ({}, {"dynamic_shapes": False}, "channels", "the target's runtime has no sizes known only at run time"),
    ],
)
def test_illegal_overrides_say_why(model, abilities, asked, why):
    with pytest.raises(UsageError, match="can't be lowered as") as error:
        choose(gate(**model), abilities=Abilities(**abilities), overrides={"g": asked})
    assert error.value.why == why
    assert "masked" in error.value.hint
    assert choose(gate(**model), abilities=Abilities(**abilities), overrides={"*": asked}).lowering != asked


@pytest.mark.parametrize("asked", ["masked", "tiles", "winograd4", "winograd2", "channels", "groups"])
def test_overrides(asked):
    choice = choose(gate(), overrides={"*": "masked", "g": asked}, costs=CostTable(COSTS))
    assert (choice.lowering, choice.reason, choice.overridden) == (asked, "asked for", True)


@pytest.mark.parametrize(
    ("overrides", "said"), [({"layer9": "tiles"}, "unknown gate"), ({"g": "tile"}, "unknown lowering")]
)
def test_unknown_names(overrides, said):
    with pytest.raises(UsageError, match=said):
        choose(gate(), overrides=overrides)


def test_nothing_but_masking():
    nothing = Abilities(conditional="eager", dynamic_shapes=False)
    choice = choose(gate(), abilities=nothing, costs=CostTable(COSTS))
    assert choice.lowering == "masked"
    assert choice.reason == "nothing else is possible: the target's runtime has no sizes known only at run time"
