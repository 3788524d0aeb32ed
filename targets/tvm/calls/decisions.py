"""Lists that kernels read, made from what gates decide. Each is made once a step, however many calls read it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from dvexport.graph.graph import static_shape
from dvexport.targets.tvm.calls.draft import Draft
from dvexport.targets.tvm.calls.memory import Buffer, Part
from dvexport.targets.tvm.kernels import lists
from dvexport.targets.tvm.kernels.abi import Kernel
from dvexport.targets.tvm.kernels.conv.direct_data import Window, cell_bounds
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.machine.dtype import S32
from dvexport.targets.tvm.machine.machine import Machine

__all__ = ["channel_list", "line_list", "lines_suffice", "not_skipped", "pixel_mask", "run_list"]


def channel_list(draft: Draft, mask: ir.Value | None, count: int, index: int) -> Part:
    """Return the list of the channels that a mask (bool `[frames, count]`) names in frame `index`, or of all."""
    if mask is None:
        return draft.constants.add(np.array([count, *range(count)], np.int32))
    return _channels(draft, mask, count, index, lists.channels_from_mask)


def not_skipped(draft: Draft, action: ir.Value, index: int) -> Part:
    """Return the list of the channels whose action (int64 `[frames, C]`) is not 0, skip."""
    return _channels(draft, action, static_shape(action)[1], index, lists.channels_other_than)


def run_list(draft: Draft, tiles: ir.Value, index: int, table: np.ndarray, run: int) -> Part:
    """Return the list of the runs (or Winograd tiles) of a frame's active cells.

    Args:
        tiles: bool `[frames, gh, gw]`.
        table: `[cells + 1 starts][output offsets][input offsets]`.
        run: lanes that an entry fills: pixels of a run; 1 for a tile.
    """
    cells = int(np.prod(static_shape(tiles)[1:]))
    total = int(table[cells])

    def make(frame: Part) -> Part:
        size = lists.run_list_size(lists.runs_capacity(total, run, draft.machine))
        made = Buffer(f"runs of {tiles.name}", S32.size(size))
        shape = draft.constants.add(lists.runs_shape(cells, total, run, draft.machine))
        arguments = [frame, draft.constants.add(table), shape, made.part()]
        draft.calls.call(
            lists.cells_to_runs(draft.machine), arguments, f"list {tiles.name}", draft.values.gate_of(tiles)
        )
        return made.part()

    return _once(draft, ("runs", tiles, index, run, table.tobytes()), tiles, index, make)


def line_list(draft: Draft, tiles: ir.Value, index: int, plane: Plane) -> Part:
    """Return the lines of a plane that a convolution over a frame's active cells reads."""
    grid = _grid(tiles)

    def make(frame: Part) -> Part:
        made = Buffer(f"lines of {tiles.name}", S32.size(lists.line_list_size(plane))).part()
        table = draft.constants.add(lists.line_table(plane, grid, plane.pad))
        shape = draft.constants.add(lists.lines_shape(plane, grid))
        kernel = lists.touched_lines(lists.table_words(grid), draft.machine)
        draft.calls.call(kernel, [frame, table, shape, made], f"list {tiles.name}", draft.values.gate_of(tiles))
        return made

    return _once(draft, ("lines", tiles, index, plane), tiles, index, make)


def lines_suffice(tiles: ir.Value, plane: Plane, window: Window, size: tuple[int, int]) -> bool:
    """Tell whether a convolution over active cells of its output reads nothing but `line_list` of those cells.

    With a stride it may not: a cell that does not divide both planes starts at other pixels in each.

    Args:
        tiles: bool `[frames, gh, gw]`.
        plane: the layout of the convolution's input.
        window: the convolution's window.
        size: height and width of its output, in pixels.
    """
    axes = zip(_grid(tiles), plane.shape, size, range(plane.rank), strict=True)
    return all(_reach_suffices(cells, read, made, window, axis, plane.pad) for cells, read, made, axis in axes)


def _reach_suffices(cells: int, read: int, made: int, window: Window, axis: int, halo: int) -> bool:
    reach = (window.kernel[axis] - 1) * window.dilations[axis] - window.pads[axis]
    for (start, stop), (low, high) in zip(cell_bounds(cells, made), cell_bounds(cells, read), strict=True):
        first, last = start * window.strides[axis] - window.pads[axis], (stop - 1) * window.strides[axis] + reach
        if start < stop and (low == high or first < low - halo or min(last, read - 1) >= high + halo):
            return False
    return True


def pixel_mask(draft: Draft, tiles: ir.Value, index: int, plane: Plane) -> Part:
    """Return a frame's tile mask as a float plane: 1 at active pixels."""

    def make(frame: Part) -> Part:
        made = Buffer(f"mask of {tiles.name}", plane.bytes).part()
        shape = draft.constants.add(lists.mask_shape(plane, _grid(tiles)))
        label, gate = f"mask {tiles.name}", draft.values.gate_of(tiles)
        draft.calls.call(lists.mask_from_tiles(draft.machine), [frame, shape, made], label, gate)
        return made

    return _once(draft, ("mask", tiles, index, plane), tiles, index, make)


def _channels(draft: Draft, source: ir.Value, count: int, index: int, kernel: Callable[[Machine], Kernel]) -> Part:
    def make(frame: Part) -> Part:
        made = Buffer(f"channels of {source.name}", S32.size(lists.channel_list_size(count))).part()
        shape = draft.constants.add(lists.channels_shape(count))
        draft.calls.call(
            kernel(draft.machine), [frame, shape, made], f"list {source.name}", draft.values.gate_of(source)
        )
        return made

    return _once(draft, ("channels", source, index), source, index, make)


def _once(draft: Draft, key: tuple[object, ...], source: ir.Value, index: int, make: Callable[[Part], Part]) -> Part:
    """Return what `make` made of frame `index` of a decision the first time."""
    if key not in draft.lists:
        frame = draft.flat(source).frame(static_shape(source)[0], index)
        draft.lists[key] = make(frame)
    return draft.lists[key]


def _grid(tiles: ir.Value) -> tuple[int, int]:
    _, rows, columns = static_shape(tiles)
    return rows, columns
