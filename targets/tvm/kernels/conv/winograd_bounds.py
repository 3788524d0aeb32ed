"""What a Winograd convolution touches, by its `shape` and its lists (`bounds.py`)."""

from __future__ import annotations

from dvexport.targets.tvm.kernels.abi import Frame
from dvexport.targets.tvm.kernels.bounds import (
    PARTS,
    Buffer,
    ListKind,
    at_least,
    ceil,
    entry,
    fits,
    known,
    least,
    most,
    reads,
    uses,
    writes,
)
from dvexport.targets.tvm.kernels.conv.winograd_lists import Shape

__all__ = ["state_winograd"]


def state_winograd(
    frame: Frame, m: int, block: tuple[int, ...], lanes: int, gap: int, *, residual: bool, inside: bool
) -> None:
    """State what a kernel touches; see `winograd.winograd_conv` for its buffers.

    Args:
        frame: the kernel's frame.
        m: edge of an output tile.
        block: output channels of the register block by vectors of tiles.
        lanes: the machine's lanes.
        gap: elements between the points of transformed input.
        residual, inside: whether it has these buffers.
    """
    n, points = m + 2, (m + 2) ** 2
    x_plane, x_pitch, y_plane, y_pitch, u_row, u_point, part = map(entry, Shape)
    rows, cols, vectors = known("rows", "limit"), known("cols", "limit"), known("tiles", "count")
    tile = known("tiles", "limit") - 1 + y_pitch * (m - 1) + m
    output = (rows - 1) * y_plane + tile
    together, listed = least(len(block), vectors), known("cols", "count")
    transformed = (together * listed * lanes + gap) * points
    products = most(*(least(vectors // count, 1) * (size * count) for count, size in enumerate(block, 1)))
    buffers: dict[str, Buffer] = {
        "X": reads((cols - 1) * x_plane + x_pitch * (n - 1) + (known("tiles", "inputs") - 1) + n),
        "U": reads((rows - 1) * u_row + u_point * (points - 1) + cols),
        "B": reads(rows),
    }
    buffers |= ({"R": reads(output)} if residual else {}) | ({"inside": reads(tile)} if inside else {})
    buffers |= {"rows": uses(ListKind.CHANNELS), "cols": uses(ListKind.CHANNELS), "tiles": uses(ListKind.RUNS, lanes)}
    buffers |= {
        "scratch": writes((PARTS - 1) * part + most(part, transformed + products * (points * lanes))),
        "shape": reads(len(Shape)),
        "Y": writes(output),
    }
    count, line = known("rows", "count"), frame.types["U"].line
    needs = fits(vectors * (count + line) * PARTS, listed * line, ceil(vectors, len(block)) * vectors)
    frame.states(buffers, at_least(1, u_point), at_least(points * lanes, part), needs)
