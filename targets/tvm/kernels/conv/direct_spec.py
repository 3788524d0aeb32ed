"""Which direct convolution a layer gets: the families of kernels, and what each is fastest for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dvexport.targets.tvm.kernels.conv.direct_data import HALVES, Runs, Window
from dvexport.targets.tvm.machine.dtype import F32, DType
from dvexport.targets.tvm.machine.machine import Machine
from dvexport.targets.tvm.machine.parameters import TALL, parameters_of

__all__ = ["BEYOND", "COLUMNS", "DirectConv", "spec_for"]

BEYOND = 8
COLUMNS = range(5, BEYOND + 2)
"""Widths of a window worth packing by columns, and the floats that its last taps reach beyond two vectors at most."""

_FEW_PIXELS = 256
"""Pixels of a plane up to which a convolution waits for its weights more than it computes."""

_FEW_ROWS = 32
"""Output channels up to which a 1 x 1 window is not worth packing for."""


@dataclass(frozen=True)
class DirectConv:
    """A family of convolutions that share one function.

    Attributes:
        taps: pixels of the window: 1; 9, for a 3 x 3 window without dilation (unpacked); 0, as many as `shape` says
            (packed).
        step: columns from one output pixel's window to the next; above `MOST_STEP` each pixel is loaded by itself.
        run: neighbouring output pixels of one entry of the run list, a power of two up to the lanes.
        inside: choose by the float plane `inside` between sums and zero, because runs cover padding. What lies in the
            padding of X and R may be any bits then, where windows don't reach beyond the image.
        residual: add R before the activation.
        relu: the activation, or none.
        packed: copy windows to scratch first.
        block: rows x vectors of the register block.
        columns: width of a window whose even and odd columns are packed, instead of every tap; 0: every tap is.
        ahead: weights are prefetched: for layers whose few pixels read each weight once. With a packed 1 x 1 window,
            which has few products for what it reads and writes, the pixels of a tile are prefetched too.
        tall: rows of the register block where no group has more than `TALL` vectors; 0: those of `block`.
        dtype: the type of pixels, weights and sums.
    """

    taps: int
    step: int
    run: int
    inside: bool
    residual: bool
    relu: bool
    packed: bool
    block: tuple[int, int]
    columns: int = 0
    ahead: bool = False
    tall: int = 0
    dtype: DType = F32

    def memory(self, machine: Machine) -> dict[str, Any]:
        """What the sizes of its buffers depend on; see `direct_shape` and `scratch_floats`."""
        rows, vectors = self.block
        block = max(rows, self.tall), vectors
        return {"packed": self.packed, "block": block, "columns": self.columns, "machine": machine, "dtype": self.dtype}

    def moved(self, taps: int) -> int:
        """Vectors that are read for a vector of windows of `taps` pixels."""
        return taps // self.columns * HALVES if self.columns else taps

    def name(self, lanes: int) -> str:
        """The symbol of this family's function."""
        taps = f"t{self.taps or 'n'}"
        kind = f"halves{self.columns}" if self.columns else "packed" if self.packed else "planes"
        marks = [mark for mark in ("ahead", "inside", "residual", "relu") if getattr(self, mark)]
        rows, vectors = self.block
        block = f"b{rows}x{vectors}" + (f"_{self.tall}x{TALL}" if self.tall else "")
        return "_".join([self.dtype.name, "direct", kind, taps, f"s{self.step}", f"r{self.run}x{lanes}", block, *marks])


def spec_for(
    window: Window,
    runs: Runs,
    channels: tuple[int, int],
    machine: Machine,
    *,
    residual: bool,
    relu: bool,
    dtype: DType = F32,
) -> DirectConv:
    """Return the family that a layer is fastest with.

    Args:
        window: geometry of the convolution.
        runs: the pixels it may be asked for.
        channels: input and output channels.
        machine: what to generate code for.
        residual, relu: what is fused.
        dtype: the type of pixels, weights and sums.
    """
    step = window.strides[-1]
    packed = not (step == 1 and _reads_planes(window, runs, channels[1], machine))
    point = window.size == 1
    taps = 1 if point else 0 if packed else 9
    wide = step == 2 and runs.run == machine.lanes and window.dilations[-1] == 1
    columns = window.kernel[-1] if wide and window.kernel[-1] in COLUMNS else 0
    plain = packed and not columns
    parameters = parameters_of(machine)
    block = parameters.packed if plain else machine.block if point else parameters.planes
    ahead = packed and (point or len(runs.outputs) * runs.run <= _FEW_PIXELS)
    tall = parameters.tall if plain and parameters.tall > block[0] else 0
    return DirectConv(taps, step, runs.run, runs.inside, residual, relu, packed, block, columns, ahead, tall, dtype)


def _reads_planes(window: Window, runs: Runs, rows: int, machine: Machine) -> bool:
    """Whether a layer is faster without packing, as measured with 16, 8 and 4 lanes on x86-64."""
    if window.size == 1:
        return machine.lanes == runs.run == 16 and rows <= _FEW_ROWS
    if window.kernel != (3, 3) or window.dilations != (1, 1):
        return False
    wide = runs.run >= (8 if machine.lanes == 16 else machine.lanes)
    return wide and (len(runs.outputs) * runs.run > parameters_of(machine).small_plane or rows < machine.block[0])
