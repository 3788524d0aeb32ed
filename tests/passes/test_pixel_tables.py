"""Index tables cover every pixel once and read what a convolution reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvexport.passes.tiles.pixel_tables import even_tile, tile_pixels, windows, winograd_tiles

sides = st.integers(1, 19).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size)))


@given(sides, sides)
def test_every_pixel_lies_in_its_cell_only(vertical, horizontal):
    (height, gh), (width, gw) = vertical, horizontal
    cells = tile_pixels((height, width), (gh, gw))
    owner = {}
    for cell, members in enumerate(cells):
        for y, x in {(int(y), int(x)) for y, x in members}:
            assert (y, x) not in owner
            owner[y, x] = cell
    assert owner == {(y, x): (y * gh // height) * gw + x * gw // width for y in range(height) for x in range(width)}
    even = even_tile((height, width), (gh, gw))
    assert (even is None) == bool(height % gh or width % gw)
    if even:
        assert cells.shape[1] == even[0] * even[1]


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    frames=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pads=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_windows_read_what_a_convolution_reads(size, frames, kernel, strides, pads, dilations):
    plane = size[0] * size[1]
    padded = np.full((frames, size[0] + 2 * pads[0] + 20, size[1] + 2 * pads[1] + 20), frames * plane)
    rows = np.arange(frames * plane).reshape(frames, *size)
    padded[:, pads[0] : pads[0] + size[0], pads[1] : pads[1] + size[1]] = rows
    pixels = tile_pixels(size, (1, 1))
    table = windows(pixels, size, frames, kernel, strides, pads * 2, dilations)
    assert table.shape == (frames, plane, kernel[0] * kernel[1])
    for frame in range(frames):
        for (y, x), reads in zip(pixels[0], table[frame], strict=True):
            top, left = y * strides[0], x * strides[1]
            window = padded[frame, top:, left:][: kernel[0] * dilations[0] : dilations[0]]
            assert reads.tolist() == window[:, : kernel[1] * dilations[1] : dilations[1]].ravel().tolist()


@pytest.mark.parametrize(("size", "grid", "step"), [((8, 8), (2, 2), 4), ((8, 8), (2, 2), 2), ((4, 8), (1, 2), 4)])
def test_winograd_patches_tile_their_cell(size, grid, step):
    corners, cells = winograd_tiles(size, grid, step), tile_pixels(size, grid)
    for patches, members in zip(corners, cells, strict=True):
        covered = [(y + i, x + j) for y, x in patches for i in range(step) for j in range(step)]
        assert sorted(covered) == sorted(map(tuple, members.tolist()))


def test_a_grid_finer_than_the_plane_is_an_error():
    with pytest.raises(ValueError, match="finer"):
        tile_pixels((3, 3), (4, 1))
