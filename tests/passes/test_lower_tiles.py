"""Tile lowerings of a single convolution; the oracle test has whole gates."""

from __future__ import annotations

import pytest
from graphs import ops
from sparse import lowers

from dvexport.errors import PassError
from dvexport.passes.tiles.lower_tiles import LowerTiles

ARGUMENTS = [
    ", tiles",
    ", tiles, , , base",
    "rows, tiles, , , base",
    "rows, tiles",
    ", tiles, , residual, base",
    ", coarse",
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("lowering", ["tiles", "winograd4", "winograd2"])
@pytest.mark.parametrize("frames", [1, 3])
def test_agrees(arguments, lowering, frames):
    model = lowers(LowerTiles(), lowering, arguments, frames, activation="relu")
    names = ops(model)
    assert "Conv" not in names
    transforms = 2 if lowering != "tiles" and "coarse" not in arguments else 0
    assert names.count("MatMul") == 1 + transforms


def test_needs_tiles():
    with pytest.raises(PassError, match="needs a tile mask"):
        lowers(LowerTiles(), "tiles", "rows")
