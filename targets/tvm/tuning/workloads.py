"""What is measured: convolutions of networks, and how much of each.

The workloads are data, `workloads.toml`. Which kernels can do one is asked of `calls/conv_options.py`, as a plan does.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from dvexport.targets.tvm.calls.conv_options import ConvLayer
from dvexport.targets.tvm.kernels.conv.direct_data import Window
from dvexport.targets.tvm.kernels.plane import Plane

__all__ = ["Work", "Workload", "draw_works", "workloads"]


@dataclass(frozen=True)
class Workload:
    """A convolution of a network, square all around.

    Attributes:
        kernel, stride: size and stride of the windows; padded so that a stride of 1 keeps the size.
        cin, cout: channels.
        size: edge of its output in pixels.
        cells: edge of its gate's grid; None: nobody chooses among pixels.
        residual: another image is added.
    """

    kernel: int
    stride: int
    cin: int
    cout: int
    size: int
    cells: int | None = None
    residual: bool = False

    @property
    def layer(self) -> ConvLayer:
        """The convolution as the code that chooses kernels takes it; followed by a ReLU."""
        pad = self.kernel // 2
        window = Window((self.kernel, self.kernel), (self.stride, self.stride), (pad, pad))
        edge, margin = self.size * self.stride, max(1, pad)
        x, y = Plane((edge, edge), margin), Plane((self.size, self.size), margin)
        grid = None if self.cells is None else (self.cells, self.cells)
        return ConvLayer(x, y, window, (self.cin, self.cout), grid, self.residual, relu=True)


@dataclass(frozen=True)
class Work:
    """What a sample computes: a workload with some of its channels and pixels. Two kernels do the same work.

    Attributes:
        rows, columns: output and input channels, ascending.
        cells: whether each cell of the grid is computed.
    """

    workload: Workload
    rows: np.ndarray
    columns: np.ndarray
    cells: np.ndarray


@cache
def workloads(purpose: str) -> tuple[Workload, ...]:
    """Return the workloads to measure `rates` or `parameters` with."""
    text = Path(__file__).with_name("workloads.toml").read_text(encoding="utf-8")
    return tuple(Workload(**each) for each in tomllib.loads(text)[purpose])


def draw_works(given: Sequence[Workload], count: int = 12, seed: int = 0) -> list[Work]:
    """Return `count` amounts of work for each workload: all, then random ones, from one channel or cell to all."""
    rng = np.random.default_rng(seed)
    return [_draw(workload, index == 0, rng) for workload in given for index in range(count)]


def _draw(workload: Workload, whole: bool, rng: np.random.Generator) -> Work:
    def subset(count: int) -> np.ndarray:
        few = round(count ** rng.random())  # half by size, half by order of magnitude
        chosen = count if whole else few if rng.random() < 0.5 else int(rng.integers(1, count + 1))
        return np.sort(rng.permutation(count)[:chosen])

    cells = np.zeros((workload.cells or 1) ** 2, bool)
    cells[subset(cells.size)] = True
    return Work(workload, subset(workload.cout), subset(workload.cin), cells)
