"""Matrix products of many rows against numpy in float64."""

from __future__ import annotations

from math import erf

import numpy as np
from plane_kernels import compiled, every_two, machine, rng, run

from dvexport.targets.tvm.kernels.tokens.matmul import (
    MatMul,
    matmul,
    matmul_bias,
    matmul_scratch,
    matmul_shape,
    matmul_weights,
)

SIZES = [(1, 1, 1), (7, 5, 3), (8, 64, 48), (33, 77, 131), (196, 96, 50), (129, 130, 16)]
"""Rows, inputs, outputs."""

SPECS = [MatMul(), MatMul("gelu"), MatMul("relu", residual=True), MatMul(residual=True)]


def reference(spec: MatMul, x: np.ndarray, weights: np.ndarray, bias: np.ndarray, residual: np.ndarray) -> np.ndarray:
    y = x.astype(np.float64) @ weights.astype(np.float64) + bias
    if spec.activation == "relu":
        y = np.maximum(y, 0)
    elif spec.activation == "gelu":
        y = y / 2 * (1 + np.vectorize(erf)(y / np.sqrt(2)))
    return y + residual if spec.residual else y


@every_two({"spec": SPECS, "rows, inputs, outputs": SIZES})
def test_product(lanes, threads, spec, rows, inputs, outputs):
    random, on = rng(), machine(lanes)
    x = random.standard_normal((rows, inputs)).astype(np.float32)
    weights = random.standard_normal((inputs, outputs)).astype(np.float32)
    bias = random.standard_normal(outputs).astype(np.float32)
    residual = random.standard_normal((rows, outputs)).astype(np.float32)
    constants = [matmul_weights(weights, on), matmul_bias(bias, on)]
    constants += [residual] if spec.residual else []
    scratch = np.full(matmul_scratch(threads, on), np.nan, np.float32)
    rubbish = np.full((rows, outputs), np.nan, np.float32)
    shape = matmul_shape(rows, inputs, outputs, on)
    y = run(compiled(matmul, lanes, spec), x, *constants, scratch, shape, rubbish, threads=threads)[-1]
    expected = reference(spec, x, weights, bias, residual)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * max(1, np.abs(expected).max()))
