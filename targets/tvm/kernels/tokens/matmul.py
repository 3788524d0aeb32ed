"""Matrix products of many rows with constant weights: the linear layers of a transformer over its tokens.

    Y[m, n] = act(B[n] + sum over k of X[m, k] * W[k, n]) (+ R[m, n])

Weights are packed at export as panels `[panels][K][panel]` of a few vectors of outputs. A block of rows that stays
in a core's second level cache is multiplied with all panels; a panel is passed over by all groups of rows of the
block (`blocks.py`). Threads share rows, or panels where there are few rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import tvm.tirx as tx
from tvm.tirx.script import builder as T

from dvexport.targets.tvm.kernels.abi import Frame, Kernel, i64, write_kernel
from dvexport.targets.tvm.kernels.blocks import Rows, balanced, product, register_block
from dvexport.targets.tvm.kernels.bounds import PARTS, at_least, ceil, entry, fits, most, reads, writes
from dvexport.targets.tvm.kernels.tokens.activations import NUMBERS, Numbers, gelu_numbers
from dvexport.targets.tvm.kernels.vectors import ceil_div, choose, constant, int32, load, store
from dvexport.targets.tvm.machine.dtype import F32, S32, DType, require_dtype
from dvexport.targets.tvm.machine.machine import Machine

__all__ = ["MatMul", "matmul", "matmul_bias", "matmul_scratch", "matmul_shape", "matmul_weights"]

_TOGETHER = 16 * 1024
"""Floats of X, by lanes, that all panels pass over together: processors with wide vectors have large caches."""

_FEW = 4
"""Groups of rows a thread below which threads rather share panels."""


class _Shape(IntEnum):
    """Entries of `shape`."""

    ROWS = 0
    OUTPUTS = 1
    INPUTS = 2
    TOGETHER = 3
    """Groups of rows of a block."""
    TILE = 4
    """Elements of a tile."""


@dataclass(frozen=True)
class MatMul:
    """A family.

    Attributes:
        activation: `relu`, `gelu` (the exact one) or nothing.
        residual: whether R is added after the activation.
        dtype: the type of X, weights and sums.
    """

    activation: str = ""
    residual: bool = False
    dtype: DType = F32

    @property
    def name(self) -> str:
        """The kernel's symbol, lanes left out."""
        return "_".join(filter(None, [self.dtype.name, "matmul", self.activation, "residual" if self.residual else ""]))


def matmul_weights(weights: np.ndarray, machine: Machine, dtype: DType = F32) -> np.ndarray:
    """Pack W `[K, N]` for the weights file: `[panels, K, panel]`, absent outputs zero."""
    inputs, outputs = weights.shape
    panel = _panel(machine)
    padded = np.zeros((inputs, -(-outputs // panel) * panel), dtype.array)
    padded[:, :outputs] = weights
    return np.ascontiguousarray(padded.reshape(inputs, -1, panel).transpose(1, 0, 2))


def matmul_bias(bias: np.ndarray, machine: Machine, dtype: DType = F32) -> np.ndarray:
    """Pad B `[N]` with zeros to whole panels."""
    panel = _panel(machine)
    padded = np.zeros(-(-len(bias) // panel) * panel, dtype.array)
    padded[: len(bias)] = bias
    return padded


def matmul_shape(rows: int, inputs: int, outputs: int, machine: Machine) -> np.ndarray:
    """Return `shape` of `matmul`."""
    together = max(1, _TOGETHER * machine.lanes // (inputs * register_block(machine)[0]))
    return np.array([rows, outputs, inputs, together, _tile(machine)], np.int32)


def matmul_scratch(threads: int, machine: Machine) -> int:
    """Return the elements of `scratch` for so many parts."""
    return threads * (_tile(machine) + NUMBERS)


def _tile(machine: Machine) -> int:
    return register_block(machine)[0] * _panel(machine)


def _panel(machine: Machine) -> int:
    return register_block(machine)[1] * machine.lanes


def matmul(spec: MatMul, machine: Machine) -> Kernel:
    """Y `[M, N]` of X `[M, K]`. Buffers: X, W, B, (R,) scratch, shape, Y; packed as above.

    Raises:
        UsageError: it computes in an element type that there is no code for.
    """
    require_dtype("matrix product", spec.dtype)
    buffers = dict.fromkeys(["X", "W", "B", *["R"] * spec.residual, "scratch"], spec.dtype)
    name = f"{spec.name}_b{'x'.join(map(str, register_block(machine)))}"
    with write_kernel(name, **buffers, shape=S32, Y=spec.dtype) as frame:
        _Writer(spec, machine, frame).write()
        _states(frame, spec, machine)
    return frame.kernel


def _states(frame: Frame, spec: MatMul, machine: Machine) -> None:
    rows, outputs, depth, together, tile = map(entry, _Shape)
    panels, groups = ceil(outputs, _panel(machine)), ceil(rows, register_block(machine)[0])
    part = _tile(machine) + NUMBERS
    stated = {"X": reads(rows * depth), "W": reads(panels * _panel(machine) * depth)}
    stated |= {"B": reads(panels * _panel(machine))} | ({"R": reads(rows * outputs)} if spec.residual else {})
    stated |= {"scratch": writes((PARTS - 1) * part + most(part, tile + NUMBERS))}
    frame.states(
        stated | {"shape": reads(len(_Shape)), "Y": writes(rows * outputs)},
        at_least(1, together),
        fits(rows * PARTS, panels * PARTS, rows + together, groups * ceil(groups, together), outputs + _panel(machine)),
    )


class _Writer:
    def __init__(self, spec: MatMul, machine: Machine, frame: Frame) -> None:
        self.spec, self.machine, self.frame, self.lanes = spec, machine, frame, machine.lanes
        self.most, self.vectors = register_block(machine)
        self.panel = self.vectors * self.lanes

    def write(self) -> None:
        frame, panel = self.frame, self.panel
        count, outputs, self.depth, together = frame.extents(list(_Shape)[: _Shape.TILE])
        self.outputs, self.tile = T.bind(i64(outputs)), T.bind(i64(frame.part) * (self.most * panel + NUMBERS))
        self.numbers = Numbers(frame.scratch, T.bind(self.tile + i64(frame.shape[int(_Shape.TILE)])))
        if self.spec.activation == "gelu":
            self.numbers.write(gelu_numbers())
        part, parts = frame.part, frame.parts
        zero, panels = int32(0), T.bind(ceil_div(outputs, panel))
        by_rows = T.bind(count >= parts * (_FEW * self.most))
        rows = balanced(
            T.bind(tx.Select(by_rows, tx.truncdiv(count * part, parts), zero)),
            T.bind(tx.Select(by_rows, tx.truncdiv(count * (part + 1), parts), count)),
            self.most,
        )
        low = T.bind(tx.Select(by_rows, zero, tx.truncdiv(panels * part, parts)))
        high = T.bind(tx.Select(by_rows, panels, tx.truncdiv(panels * (part + 1), parts)))
        blocks = T.bind(tx.truncdiv(rows.count + together - 1, together))
        with T.serial(0, blocks) as block:
            start = T.bind(tx.truncdiv(rows.count * block, blocks))
            stop = T.bind(tx.truncdiv(rows.count * (block + 1), blocks))
            with T.serial(low, high) as index:
                column = T.bind(i64(index) * panel)
                weights = T.bind(column * i64(self.depth))
                with T.serial(start, stop) as group:
                    row, size = rows.group(group)
                    choose(size, self.most, lambda n: self._product(row, n, column, weights))
                    self._epilogue(T.bind(i64(row)), size, column)

    def _product(self, row: Any, count: int, column: Any, weights: Any) -> None:
        frame, lanes = self.frame, self.lanes
        stride = T.bind(i64(self.depth))
        starts = [T.bind(load(frame.B, column + vector * lanes, lanes)) for vector in range(self.vectors)]
        product(
            Rows(frame.X, T.bind(i64(row) * stride), stride), count, (frame.W, weights, self.panel), self.depth,
            (frame.scratch, self.tile, self.panel), (self.vectors, lanes), self.machine,
            starts=lambda _, vector: starts[vector],
        )  # fmt: skip

    def _epilogue(self, row: Any, size: Any, column: Any) -> None:
        """Finish the sums of a tile and write the outputs that exist."""
        lanes = self.lanes
        left = T.bind(tx.min(self.outputs - column, i64(self.panel)))
        whole = T.bind(tx.Cast(S32.tvm, tx.truncdiv(left, i64(lanes))))
        with T.serial(0, size) as each:
            source = T.bind(self.tile + i64(each) * self.panel)
            target = T.bind((row + i64(each)) * self.outputs + column)
            with T.serial(0, whole) as vector:
                self._finish(T.bind(source + i64(vector) * lanes), T.bind(target + i64(vector) * lanes), lanes)
            with T.serial(whole * lanes, tx.Cast(S32.tvm, left)) as one:
                self._finish(T.bind(source + i64(one)), T.bind(target + i64(one)), 1)

    def _finish(self, source: Any, target: Any, lanes: int) -> None:
        value = T.bind(load(self.frame.scratch, source, lanes))
        if self.spec.activation == "relu":
            value = tx.max(value, constant(0.0, self.spec.dtype, lanes))
        elif self.spec.activation == "gelu":
            value = self.numbers.gelu(value, lanes)
        if self.spec.residual:
            value = value + load(self.frame.R, target, lanes)
        store(self.frame.Y, target, value, lanes)
