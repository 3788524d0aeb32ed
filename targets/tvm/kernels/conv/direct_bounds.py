"""What a direct convolution touches, by its `shape` and its lists (`bounds.py`)."""

from __future__ import annotations

from dvexport.targets.tvm.kernels.abi import Frame
from dvexport.targets.tvm.kernels.bounds import (
    PARTS,
    Buffer,
    ListKind,
    Size,
    ceil,
    entry,
    fits,
    known,
    largest,
    least,
    most,
    reads,
    size,
    uses,
    writes,
)
from dvexport.targets.tvm.kernels.conv.direct_data import HALVES, Shape
from dvexport.targets.tvm.kernels.conv.direct_spec import BEYOND, DirectConv
from dvexport.targets.tvm.kernels.plane import MOST_STEP
from dvexport.targets.tvm.machine.machine import Machine

__all__ = ["state_direct"]

_LOADED = 4
"""Weights that AArch64 loads together, even where one is wanted."""


def state_direct(frame: Frame, spec: DirectConv, machine: Machine) -> None:
    """State what a kernel of a family touches; see `direct.direct_conv` for its buffers."""
    lanes = machine.lanes
    rows, cols = known("rows", "limit"), known("cols", "limit")
    depth = _depth(spec)
    lines = depth // spec.columns if spec.columns else depth
    weights = (rows - 1) * _entry(Shape.W_ROW) + cols * depth + (_LOADED - 1 if machine.is_aarch64 else 0)
    pixels = (rows - 1) * _entry(Shape.Y_PLANE) + known("runs", "limit") - 1 + spec.run
    buffers: dict[str, Buffer] = {"X": reads(_pixels_read(spec, cols, lines, lanes)), "W": reads(weights)}
    buffers |= {"B": reads(rows)} | ({"R": reads(pixels)} if spec.residual else {})
    buffers |= {"inside": reads(known("runs", "limit") - 1 + lanes)} if spec.inside else {}
    buffers |= {"rows": uses(ListKind.CHANNELS), "cols": uses(ListKind.CHANNELS)}
    buffers |= {"runs": uses(ListKind.RUNS, lanes // spec.run)}
    count, vectors = known("rows", "count"), known("runs", "count")
    tile, panel, panels = _memory(spec, lines, lanes)
    together = most(_entry(Shape.TOGETHER) // most(panel, 1), 1)
    windows = least(together, panels) * panel if spec.packed else size(0)
    buffers |= {"scratch": writes((PARTS - 1) * _entry(Shape.SCRATCH) + tile + windows)}
    taps = depth if spec.packed else size(spec.taps)
    buffers |= {"shape": reads(taps + int(Shape.FIRST_TAP)), "Y": writes(pixels)}
    needs = fits(count * (vectors + PARTS), vectors * (count + PARTS), panel, panels * ceil(panels, together))
    frame.states(buffers, needs, ((_entry(Shape.PREFER_ROWS), size(1)),))


def _depth(spec: DirectConv) -> Size:
    """Pixels of a window."""
    if not spec.packed or spec.taps:
        return size(spec.taps)
    return _entry(Shape.TAPS)


def _pixels_read(spec: DirectConv, cols: Size, lines: Size, lanes: int) -> Size:
    """Floats of X: from the first pixel of a window under a tap on, as many as a vector of windows takes."""
    first = int(Shape.FIRST_TAP)
    if spec.columns:
        tap, beyond = largest(first, lines, spec.columns), 2 * lanes + BEYOND
    elif spec.packed:
        tap, beyond = largest(first, lines), _under_a_tap(spec)
    elif spec.taps == 1:
        tap, beyond = size(0), spec.run
    else:
        tap, beyond = largest(first, 3, 3), spec.run + 2
    return (cols - 1) * _entry(Shape.X_PLANE) + tap + (known("runs", "inputs") - 1) + beyond


def _under_a_tap(spec: DirectConv) -> int:
    """Elements of a row from the first that a run reads under one tap: whole vectors up to a stride of 2."""
    if spec.run == 1 or spec.step > MOST_STEP:
        return (spec.run - 1) * spec.step + 1
    return spec.run * spec.step


def _memory(spec: DirectConv, lines: Size, lanes: int) -> tuple[Size, Size, Size]:
    """Return the floats of a tile of sums, those of a panel of packed windows, and the most panels of a thread."""
    row = spec.block[1] * lanes
    line = HALVES * row if spec.columns else row
    panel = known("cols", "count") * (lines if spec.packed else size(1)) * line
    return size(max(spec.block[0], spec.tall) * row), panel, ceil(known("runs", "count"), spec.block[1])


def _entry(place: Shape) -> Size:
    return entry(int(place))
