"""Embeddings of patches as matrix products: a convolution whose windows do not overlap moves each pixel once."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir

from dvexport.graph.graph import Builder, array_of, static_shape
from dvexport.graph.match import is_op, only_user

__all__ = ["EmbedPatches"]

_LEAST_STRIDE = 4
"""Pixels from which windows are patches; smaller ones are convolutions' own business."""


class EmbedPatches(ir.passes.InPlacePass):
    """Replace convolutions, of any number of axes, whose windows lie side by side.

    Y = conv(X) is patches `[N * places, C * window]` times weights, as `[N, places, channels]`. What turns the
    result into just that (a flattening and a transposition) vanishes; any other reader gets it turned back.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite convolution by convolution."""
        convolutions = [node for node in model.graph if is_op(node, "Conv")]
        found = [node for node in convolutions if _lies_side_by_side(node)]
        for node in found:
            _replace(model, node)
        return ir.passes.PassResult(model, modified=bool(found))


def _lies_side_by_side(node: ir.Node) -> bool:
    weight, x = array_of(node.inputs[1]), node.inputs[0]
    if weight is None or x is None or x.shape is None or any(not isinstance(size, int) for size in x.shape):
        return False
    if len(node.inputs) > 2 and node.inputs[2] is not None and array_of(node.inputs[2]) is None:
        return False
    window, given = list(weight.shape[2:]), node.attributes

    def ints(name: str, default: list[int]) -> list[int]:
        return list(given[name].as_ints()) if name in given else default

    ones = [1] * len(window)
    plain = ints("dilations", ones) == ones and not any(ints("pads", [0]))
    whole = weight.shape[1] == static_shape(x)[1]  # one group
    padded = "auto_pad" in given and given["auto_pad"].as_string() not in ("NOTSET", "VALID")
    fits = not any(size % step for size, step in zip(static_shape(x)[2:], window, strict=True))
    return plain and whole and fits and not padded and ints("strides", ones) == window and window[-1] >= _LEAST_STRIDE


def _replace(model: ir.Model, node: ir.Node) -> None:
    x, weight = node.inputs[0], array_of(node.inputs[1])
    assert x is not None and weight is not None
    count, channels, *sizes = static_shape(x)
    outputs, window = len(weight), weight.shape[2:]
    places = [size // step for size, step in zip(sizes, window, strict=True)]
    build, dtype = Builder("patches", node.metadata_props), ir.DataType.FLOAT
    axes = len(window)
    split = [count, channels, *(each for pair in zip(places, window, strict=True) for each in pair)]
    perm = [0, *(2 + 2 * i for i in range(axes)), 1, *(3 + 2 * i for i in range(axes))]
    cut = build.op("Reshape", x, build.const(np.array(split, np.int64)), shape=split, dtype=dtype)
    turned = build.op("Transpose", cut, perm=perm, shape=[split[axis] for axis in perm], dtype=dtype)
    rows, depth = count * prod(places), channels * prod(window)
    flat = build.op("Reshape", turned, build.const(np.array([rows, depth], np.int64)), shape=[rows, depth], dtype=dtype)
    factor = build.const(np.ascontiguousarray(weight.reshape(outputs, -1).T))
    y = build.op("MatMul", flat, factor, shape=[rows, outputs], dtype=dtype)
    bias = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is not None:
        y = build.op("Add", y, build.const(bias), shape=[rows, outputs], dtype=dtype)
    last = _tokens_of(node.outputs[0], [count, outputs, prod(places)])
    if last is not None:
        shape = [count, prod(places), outputs]
        y = build.op("Reshape", y, build.const(np.array(shape, np.int64)), shape=shape, dtype=dtype)
    else:
        last, grid = node.outputs[0], [count, *places, outputs]
        y = build.op("Reshape", y, build.const(np.array(grid, np.int64)), shape=grid, dtype=dtype)
        back = [0, axes + 1, *range(1, axes + 1)]
        y = build.op("Transpose", y, perm=back, shape=[grid[axis] for axis in back], dtype=dtype)
    y.name = last.name
    model.graph.insert_before(node, build.nodes)
    producer = last.producer()
    assert producer is not None
    ir.convenience.replace_all_uses_with(last, y, replace_graph_outputs=True)
    while producer is not None and all(not value.uses() for value in producer.outputs):
        before = producer.inputs[0]
        model.graph.remove(producer, safe=True)
        if producer is node:
            break
        producer = None if before is None else before.producer()


def _tokens_of(value: ir.Value, shape: list[int]) -> ir.Value | None:
    """Return the value that flattening places and transposing make of a result, if nobody else reads that."""
    for op_type in ("Reshape", "Transpose"):
        user = only_user(value)
        if user is None or not is_op(user, op_type):
            return None
        value = user.outputs[0]
        if is_op(user, "Reshape") and list(static_shape(value)) != shape:
            return None
        if is_op(user, "Transpose") and list(user.attributes.get_ints("perm", ())) != [0, 2, 1]:
            return None
    return value
