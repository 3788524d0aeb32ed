"""Weights that are made of others when a plan is opened, against numpy; and derivations that don't fit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from native_harness import host_machine
from runtime_plans import Network, network, relu
from winograd_weights import winograd_weights

from dvexport.errors import DeviceError
from dvexport.targets.tvm.calls.memory import Constants, Recipe
from dvexport.targets.tvm.kernels.conv.direct_data import direct_weights
from dvexport.targets.tvm.kernels.conv.winograd_lists import row_floats
from dvexport.targets.tvm.kernels.conv.winograd_points import weight_matrix
from dvexport.targets.tvm.plan import Alternative, Call, Derivation, Place, Plan, Port, Space
from dvexport.targets.tvm.session import NativeSession

OUTPUTS, INPUTS = 3, 5


def opened(net: Network) -> NativeSession:
    return NativeSession(net.library, net.plan, net.weights)


def weight() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((OUTPUTS, INPUTS, 3, 3)).astype(np.float32)


def derived_plan(m: int) -> tuple[Plan, bytes]:
    """A plan that puts out Y = relu(U) for the weights U of F(m x m, 3 x 3), and its weights."""
    constants, matrix = Constants(), weight_matrix(m)
    rows = direct_weights(weight())
    size = OUTPUTS * row_floats(m, INPUTS)
    source, transform, shape = (constants.add(each) for each in (rows, matrix, np.array([size], np.int32)))
    recipe = Recipe(source, transform, *matrix.shape, OUTPUTS, INPUTS, rows.shape[1], row_floats(m, INPUTS))
    assert constants.derive(recipe) == constants.derive(recipe)

    def place(part):
        return Place(Space.WEIGHTS, constants.offset(part.buffer), part.size)

    target, y = Place(Space.DERIVED, 0, 4 * size), Place(Space.ARENA, 64, 4 * size)
    numbers = *matrix.shape, OUTPUTS, INPUTS, recipe.source_row, recipe.target_row
    made = Derivation(place(source), place(transform), target, *numbers)
    plan = Plan(
        [Port("x", "float32", (1,), Place(Space.ARENA, 0, 4))],
        [Port("y", "float32", (size,), y)],
        [Call((Alternative("relu", (target, place(shape), y)),), "relu")],
        arena=64 + 4 * size, derived=4 * size, derivations=[made],
    )  # fmt: skip
    return plan, bytes(constants.file())


@pytest.mark.parametrize("m", [2, 4])
def test_they_are_winograd_s(m):
    plan, weights = derived_plan(m)
    with opened(network(plan, [relu()], weights, host_machine())) as session:
        made = session.run({"x": np.zeros(1, np.float32)})["y"]
        assert session.info.derived >= plan.derived
    wanted = np.maximum(winograd_weights(weight(), m), 0).ravel()
    np.testing.assert_allclose(made, wanted, rtol=2e-7)
    assert (wanted > 0).sum() > OUTPUTS * INPUTS


DAMAGE = [
    ({"points": 0}, "derivation 0 has a size out of range"),
    ({"points": 17}, "has a size out of range"),
    ({"edge": 9}, "has a size out of range"),
    ({"inputs": 0}, "has a size out of range"),
    ({"source": Place(Space.ARENA, 0, 64)}, "derivation 0 is not from weights"),
    ({"target": Place(Space.WEIGHTS, 0, 64)}, "derivation 0 is not from weights"),
    ({"inputs": INPUTS + 8}, "derivation 0 does not fit its places"),
    ({"outputs": OUTPUTS + 1}, "does not fit its places"),
    ({"source_row": 8}, "does not fit its places"),
    ({"target_row": 1 << 63}, "does not fit its places"),
    ({"target": Place(Space.DERIVED, 64, 1 << 40)}, "a place of derivation 0 lies outside its memory space"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGE)
def test_one_that_does_not_fit_is_refused(change, message):
    plan, weights = derived_plan(4)
    plan.derivations = [dataclasses.replace(plan.derivations[0], **change)]
    with pytest.raises(DeviceError, match=message):
        opened(network(plan, [relu()], weights, host_machine()))


def test_too_many_of_them_are_refused():
    plan, weights = derived_plan(2)
    plan.derived = 1 << 50
    with pytest.raises(DeviceError, match="weights made when opened are more than this device has"):
        opened(network(plan, [relu()], weights, host_machine()))
