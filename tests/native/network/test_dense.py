"""Matrix products of few rows against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from plane_kernels import compiled, every_machine, every_two, machine, rng, run

from dvexport.targets.tvm.kernels.tokens.dense import (
    Dense,
    dense,
    dense_bias,
    dense_scratch,
    dense_shape,
    dense_spec,
    dense_weights,
)


def check(spec: Dense, lanes: int, threads: int, rows: int, outputs: int, inputs: int) -> None:
    random = rng()
    x = random.standard_normal((rows, inputs)).astype(np.float32)
    weights = random.standard_normal((outputs, inputs)).astype(np.float32)
    bias = random.standard_normal(outputs).astype(np.float32)
    expected = x.astype(np.float64) @ weights.T.astype(np.float64) + bias
    target = machine(lanes)
    constants = dense_weights(weights, spec, target), dense_bias(bias, spec, target), dense_shape(rows, outputs, inputs)
    rubbish = np.full((rows, outputs), np.nan, np.float32)
    y = run(compiled(dense, lanes, spec), x, *constants, rubbish, threads=threads)[-1]
    expected = np.maximum(expected, 0) if spec.relu else expected
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@every_two(
    {"vectors": [1, 2, 4], "rows, outputs, inputs": [(1, 1, 1), (1, 96, 64), (2, 131, 77), (7, 65, 9), (32, 10, 128)]}
)
def test_product(lanes, threads, vectors, rows, outputs, inputs):
    check(Dense(vectors), lanes, threads, rows, outputs, inputs)


@every_two({"rows": [1, 3, 8]})
def test_relu(lanes, threads, rows):
    check(Dense(2, relu=True), lanes, threads, rows, 128, 97)


@every_machine
def test_classifier(lanes):
    spec = dense_spec(1000, machine(lanes))
    check(spec, lanes, 2, 1, 1000, 512)


@every_machine
@pytest.mark.parametrize("outputs", [1, 10, 96, 101, 128, 1000])
def test_a_spec_pads_outputs_by_little(lanes, outputs):
    spec = dense_spec(outputs, machine(lanes))
    assert -(-outputs // (spec.vectors * lanes)) * spec.vectors <= 1.15 * -(-outputs // lanes)


@every_two({"vectors": [1, 4, 8], "zeros": [0.0, 0.5, 1.0], "outputs, inputs": [(1, 1), (131, 77), (384, 130)]})
def test_zeros_are_left_out(lanes, threads, vectors, zeros, outputs, inputs):
    random, target = rng(), machine(lanes)
    if vectors == 8 and lanes == 8:
        vectors = 4  # more than the registers hold
    spec = Dense(vectors, skips=True)
    x = random.standard_normal((1, inputs)).astype(np.float32)
    x[0, random.random(inputs) < zeros] = 0
    weights = random.standard_normal((outputs, inputs)).astype(np.float32)
    bias = random.standard_normal(outputs).astype(np.float32)
    expected = x.astype(np.float64) @ weights.T.astype(np.float64) + bias
    poisoned = weights.copy()
    poisoned[:, x[0] == 0] = np.nan  # whoever reads these weights fails
    constants = dense_weights(poisoned, spec, target), dense_bias(bias, spec, target)
    listed = np.zeros(dense_scratch(inputs, threads), np.int32)
    shape, rubbish = dense_shape(1, outputs, inputs), np.full((1, outputs), np.nan, np.float32)
    y = run(compiled(dense, lanes, spec), x, *constants, listed, shape, rubbish, threads=threads)[-1]
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
