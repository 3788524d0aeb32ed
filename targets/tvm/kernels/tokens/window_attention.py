"""Attention in windows: as `attention.py`, with biases that are shared, chosen and repeated.

The logits of shifted windows have a bias by head and relative position, the same in every window. They have one of a
few masks, and each window names its own. Once tokens were dropped, they have one number for each key, the same for all
queries. Laid out in full the last two would be as large as the scores. So each bias comes with a table of the part that
each batch reads, and with a stride from one query to the next that may be 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.abi import Kernel, i64, write_kernel
from dvexport.targets.tvm.kernels.blocks import register_block
from dvexport.targets.tvm.kernels.bounds import Size, entry, largest, most, size
from dvexport.targets.tvm.kernels.tokens.attention import Attention, Sizes, Strides, _Writer, attention_shape, state
from dvexport.targets.tvm.machine.dtype import S32, require_dtype
from dvexport.targets.tvm.machine.machine import Machine

__all__ = ["WindowBias", "window_attention", "window_shape"]

_ENTRIES = 4


@dataclass(frozen=True)
class WindowBias:
    """Where a bias `[parts, heads, queries, keys]` lies; a row's keys are neighbours.

    Attributes:
        parts: which part each batch reads.
        part, head, row: strides in floats, 0 for what is the same.
    """

    parts: tuple[int, ...]
    part: int
    head: int
    row: int


def window_shape(
    sizes: Sizes, strides: tuple[Strides, ...], biases: tuple[WindowBias, ...], spec: Attention, machine: Machine
) -> np.ndarray:
    """Return the int32 constant `shape`: that of `attention`, then of each bias its strides and its table's place."""
    head = attention_shape(sizes, strides, (), spec, machine)
    first = len(head) + _ENTRIES * len(biases)
    entries, tables = list[int](), list[int]()
    for index, bias in enumerate(biases):
        assert len(bias.parts) == sizes.batches, bias
        entries += [bias.part, bias.head, bias.row, first + index * sizes.batches]
        tables += bias.parts
    return np.concatenate([head, entries, tables]).astype(np.int32)


def window_attention(spec: Attention, machine: Machine) -> Kernel:
    """Y of Q, K, V and biases. Buffers: Q, K, V, bias0, ..., scale `[1]`, scratch, shape, Y.

    Raises:
        UsageError: it computes in an element type that there is no code for.
    """
    require_dtype("window attention", spec.dtype)
    biases = [f"bias{index}" for index in range(spec.biases)]
    types = dict.fromkeys(["Q", "K", "V", *biases, "scale", "scratch"], spec.dtype)
    name = f"{spec.dtype}_window_{spec.family}_{'x'.join(map(str, register_block(machine)))}"
    with write_kernel(name, **types, shape=S32, Y=spec.dtype) as frame:
        first = len(attention_shape(_ONE, _FOUR, (), spec, machine))
        _WindowWriter(spec, machine, frame, first).write()
        state(frame, spec, machine, *_bias_bounds(spec, first))
    return frame.kernel


def _bias_bounds(spec: Attention, first: int) -> tuple[dict[str, Size], Size]:
    """Return the floats of each bias that are read, and the entries of `shape`, tables included."""
    batches, heads, queries, keys = map(entry, range(4))
    made, end = dict[str, Size](), size(first + _ENTRIES * spec.biases)
    for index in range(spec.biases):
        part, head, apart, table = (entry(first + _ENTRIES * index + i) for i in range(_ENTRIES))
        made[f"bias{index}"] = largest(table, batches) * part + (heads - 1) * head + (queries - 1) * apart + keys
        end = most(end, table + batches)
    return made, end


_ONE, _FOUR = Sizes(1, 1, 1, 1, 1, 1), (Strides(0, 0, 0, 0),) * 4


class _WindowWriter(_Writer):
    def __init__(self, spec: Attention, machine: Machine, frame: Any, first: int) -> None:
        super().__init__(spec, machine, frame)
        self.first = first

    def _bias_starts(self, row: Any) -> list[Any]:
        frame, starts = self.frame, []
        for index in range(self.spec.biases):
            part, head, apart, table = (T.bind(frame.shape[self.first + _ENTRIES * index + i]) for i in range(_ENTRIES))
            number = T.bind(frame.shape[i64(table) + i64(self.batch)])
            start = i64(number) * i64(part) + i64(self.head) * i64(head)
            starts.append(T.bind(start + i64(row) * i64(apart)))
        return starts
