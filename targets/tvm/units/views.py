"""Values that are another value seen differently: by strides, so that kernels read them where they lie.

Splitting heads and transposing move nothing then. NumPy knows what is a view and what needs a copy: operators
are applied to an empty array, and where the result lies in it is read off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from dvexport.graph.graph import array_of, static_shape
from dvexport.graph.match import is_op, made_by

__all__ = ["LARGE", "View", "factor_of", "is_dense", "is_float", "is_static", "view_of"]

LARGE = 1 << 12
"""Elements from which a view is worth more than the copy in an island, which may be fused with others."""

_OPERATORS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "Slice", "Identity", "Mul", "Div")
_FACTORS = ("Mul", "Div")


@dataclass(frozen=True)
class View:
    """A value as elements of another.

    Attributes:
        base: what lies in memory, dense.
        offset: where the first element lies, in elements.
        shape: the view's shape.
        strides: by axis, in elements.
        scale: constant that all elements are multiplied by.
        nodes: operators between, from the base on.
    """

    base: ir.Value
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    scale: float
    nodes: tuple[ir.Node, ...]

    def axis(self, axis: int) -> int:
        """Return the stride of an axis, 0 for one that the shape lacks or that has one element."""
        if axis < -len(self.shape) or self.shape[axis] == 1:
            return 0
        return self.strides[axis]

    def turned(self) -> View:
        """Return the view with its last two axes exchanged."""
        shape = (*self.shape[:-2], *self.shape[:-3:-1])
        return replace(self, shape=shape, strides=(*self.strides[:-2], *self.strides[:-3:-1]))


def view_of(value: ir.Value, *, scaled: bool = False) -> View:
    """Return a value as a view of the earliest value that it is one of; at least of itself.

    Args:
        value: one with a static shape.
        scaled: whether it may also be multiplied by a constant on the way.
    """
    chain: list[ir.Node] = []
    at = value
    while (node := made_by(at, *_OPERATORS)) is not None:
        before = node.inputs[0]
        if before is None or array_of(before) is not None or not is_static(before):
            break
        if is_op(node, *_FACTORS) and (not scaled or factor_of(node) is None):
            break
        chain.append(node)
        at = before
    for skipped in range(len(chain) + 1):
        nodes = tuple(reversed(chain[: len(chain) - skipped]))
        base = nodes[0].inputs[0] if nodes else value
        assert base is not None
        found = _apply(base, nodes, value)
        if found is not None:
            return found
    raise AssertionError(value)


def is_static(value: ir.Value | None) -> bool:
    """Tell whether a value's shape is known in full; what expansions wrote may leave it out."""
    return value is not None and value.shape is not None and all(isinstance(size, int) for size in value.shape)


def is_dense(view: View) -> bool:
    """Tell whether a view's elements lie one after another."""
    size = 1
    for extent, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if extent != 1 and stride != size:
            return False
        size *= extent
    return True


def _apply(base: ir.Value, nodes: tuple[ir.Node, ...], value: ir.Value) -> View | None:
    whole = np.empty(static_shape(base), np.int8)
    seen, scale = whole, 1.0
    for index, node in enumerate(nodes):
        result = nodes[index + 1].inputs[0] if index + 1 < len(nodes) else value
        assert result is not None
        if is_op(node, *_FACTORS):
            factor = factor_of(node)
            assert factor is not None
            scale *= factor
            continue
        after = _step(node, seen, result)
        if after is None or not np.may_share_memory(whole, after):
            return None
        seen = after
    start = seen.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    return View(base, start, seen.shape, seen.strides, scale, nodes)


def _step(node: ir.Node, x: np.ndarray, result: ir.Value) -> np.ndarray | None:
    """Apply an operator to a view; what must be copied is not one."""
    shape = static_shape(result)
    if is_op(node, "Transpose"):
        return x.transpose(node.attributes.get_ints("perm"))
    if is_op(node, "Split"):
        axis = node.attributes.get_int("axis", 0)
        sizes = [static_shape(each)[axis] for each in node.outputs]
        first = sum(sizes[: node.outputs.index(result)])
        return np.moveaxis(np.moveaxis(x, axis, 0)[first : first + static_shape(result)[axis]], 0, axis)
    if is_op(node, "Slice"):
        return _slice(node, x)
    return x.reshape(shape)


def _slice(node: ir.Node, x: np.ndarray) -> np.ndarray | None:
    arrays = [array_of(each) for each in node.inputs[1:]]
    if len(arrays) < 3 or any(array is None for array in arrays):
        return None
    starts, stops, axes, *steps = [[int(n) for n in np.atleast_1d(array)] for array in arrays if array is not None]
    where = [slice(None)] * x.ndim
    for i, axis in enumerate(axes):
        step = steps[0][i] if steps else 1
        if step <= 0:
            return None
        where[axis % x.ndim] = slice(starts[i], stops[i], step)
    return x[tuple(where)]


def factor_of(node: ir.Node) -> float | None:
    """Return the constant that a Mul or Div multiplies its first input by, None if that is no single number."""
    array = array_of(node.inputs[1])
    if array is None or array.size != 1 or array.ndim > len(node.outputs[0].shape or ()):
        return None
    number = float(array.reshape(()))
    return number if is_op(node, "Mul") else 1 / number


def is_float(value: ir.Value | None) -> bool:
    """Tell whether a value is float32, as far as anybody says, and its shape is known."""
    return value is not None and value.dtype in (ir.DataType.FLOAT, None) and value.shape is not None
