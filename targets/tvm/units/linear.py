"""Units of linear layers: products with a constant matrix, and what follows them.

Products of many rows are `linear` (`kernels/tokens/matmul.py`), those of few rows `gemm` (`kernels/tokens/dense.py`),
which reading the weights bounds.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from dvexport.graph.graph import array_of, static_shape
from dvexport.graph.match import is_op, only_user, other_input
from dvexport.targets.tvm.units.kinds import Family, Role
from dvexport.targets.tvm.units.unit import Unit
from dvexport.targets.tvm.units.views import is_float

__all__ = ["FAMILY", "LinearUnit"]

FAMILY = Family()

_FEW_ROWS = 16
"""Rows below which a product is bound by reading the weights."""


@dataclass(kw_only=True)
class LinearUnit(Unit):
    """act(x W + bias) + residual.

    Attributes:
        x: `[..., K]`.
        weight: `[K, N]`.
        bias: `[N]`.
        activation: `relu`, `gelu` or nothing.
        residual: has the result's shape, `[..., N]`.
    """

    x: ir.Value
    weight: np.ndarray
    bias: np.ndarray | None = None
    activation: str = ""
    residual: ir.Value | None = None


@FAMILY.kind("linear", ops=("MatMul", "Gemm"), role=Role.COMPUTE, flat=True)
def _linear(node: ir.Node, images: Collection[ir.Value]) -> LinearUnit | None:
    x, factors = node.inputs[0], _factors(node)
    if x is None or not is_float(x) or array_of(x) is not None or factors is None:
        return None
    shape = static_shape(x)
    if len(shape) < 2 or prod(shape[:-1]) < _FEW_ROWS:
        return None
    weight, bias = factors
    unit = LinearUnit(kind="linear", nodes=[node], x=x, weight=weight, bias=bias)
    _fuse_bias(unit)
    _fuse_activation(unit)
    _fuse_sum(unit)
    return unit


def _factors(node: ir.Node) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Return the constant matrix `[K, N]` and the bias `[N]` of a product; None if they are something else."""
    weight = array_of(node.inputs[1])
    if weight is None or weight.ndim != 2:
        return None
    if is_op(node, "MatMul"):
        return weight, None
    if not _is_plain(node) or not _has_constant_bias(node):
        return None
    weight = weight.T if node.attributes.get_int("transB", 0) else weight
    bias = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    return None if bias is not None and bias.shape != (weight.shape[1],) else (weight, bias)


def _is_plain(gemm: ir.Node) -> bool:
    """Tell whether a Gemm is x W + bias, its first factor as it is."""
    given = gemm.attributes
    return given.get_int("transA", 0) == 0 and all(given.get_float(key, 1.0) == 1 for key in ("alpha", "beta"))


def _has_constant_bias(gemm: ir.Node) -> bool:
    """Tell whether the bias of a Gemm, if any, is a constant."""
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    return bias is None or array_of(bias) is not None


def _fuse_bias(unit: LinearUnit) -> None:
    value = unit.last.outputs[0]
    after = only_user(value)
    if unit.bias is not None or after is None or not is_op(after, "Add"):
        return
    constant = array_of(other_input(after, value))
    if constant is not None and constant.shape == static_shape(value)[-1:]:
        unit.bias = constant
        unit.nodes.append(after)


def _fuse_activation(unit: LinearUnit) -> None:
    after = only_user(unit.last.outputs[0])
    exact = after is not None and after.attributes.get_string("approximate", "none") == "none"
    if after is not None and is_op(after, "Relu", "Gelu") and exact:
        unit.activation = after.op_type.lower()
        unit.nodes.append(after)


def _fuse_sum(unit: LinearUnit) -> None:
    value = unit.last.outputs[0]
    after = only_user(value)
    if after is None or not is_op(after, "Add"):
        return
    other = other_input(after, value)
    alike = other is not None and is_float(other) and static_shape(other) == static_shape(unit.nodes[0].outputs[0])
    if alike and other is not value:
        unit.residual = other
        unit.nodes.append(after)


@FAMILY.kind("gemm", ops=("Gemm",), role=Role.DECIDE)
def _gemm(node: ir.Node, images: Collection[ir.Value]) -> Unit | None:
    weight, bias = array_of(node.inputs[1]), array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    turned = node.attributes.get_int("transB", 0) == 1
    if weight is None or not turned or not _is_plain(node) or not _has_constant_bias(node):
        return None
    if bias is not None and bias.shape != (len(weight),):
        return None
    unit = Unit("gemm", [node])
    after = only_user(node.outputs[0])
    if after is not None and is_op(after, "Relu"):
        unit.nodes.append(after)
    return unit
