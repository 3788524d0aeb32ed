"""What attention touches, by its `shape` (`bounds.py`)."""

from __future__ import annotations

from collections.abc import Mapping

from dvexport.targets.tvm.kernels.abi import Frame
from dvexport.targets.tvm.kernels.bounds import (
    PARTS,
    Needs,
    Size,
    at_least,
    ceil,
    entry,
    fits,
    most,
    reads,
    size,
    writes,
)
from dvexport.targets.tvm.kernels.tokens.activations import NUMBERS

__all__ = ["state_attention"]


def state_attention(
    frame: Frame,
    places: Mapping[str, int],
    biases: Mapping[str, Size],
    panels: Mapping[str, int],
    shape: Size | int,
    needs: Needs,
) -> None:
    """State what a kernel touches; see `attention.attention` for its buffers.

    Args:
        frame: the kernel's frame.
        places: entries of `shape` by what they say: the sizes, and each tensor's five strides by its name.
        biases: by name the floats of each bias that are read.
        panels: `keys`, keys of a panel; `width`, values of a panel, 0 without softmax; `tiles`, floats of the tiles;
            `queries`, of a block.
        shape: its entries.
        needs: what the biases need.
    """
    batches, heads, queries, keys, depth, values = (
        entry(places[name]) for name in ("batches", "heads", "queries", "keys", "depth", "width")
    )
    last = {"Q": (queries, depth), "K": (keys, size(0)), "V": (keys, values)}
    last["Y"] = (queries, values if panels["width"] else keys)
    floats: dict[str, Size] = {}
    for name, (rows, columns) in last.items():
        if name in places:
            offset, batch, head, row, column = (entry(places[name] + i) for i in range(5))
            end = (depth - 1) * column + 1 if name == "K" else columns
            floats[name] = offset + (batches - 1) * batch + (heads - 1) * head + (rows - 1) * row + end
    part, pitch = entry(places["slice"]), entry(places["pitch"])
    packed = ceil(keys, panels["keys"]) * panels["keys"]
    used = packed * depth + (2 * NUMBERS + panels["queries"] + panels["tiles"])
    if panels["width"]:
        scores = most(pitch * panels["queries"], pitch * (panels["queries"] - 1) + packed)
        used = used + scores + ceil(values, panels["width"]) * panels["width"] * keys
    stated = {name: writes(each) if name == "Y" else reads(each) for name, each in floats.items()}
    stated |= {name: reads(each) for name, each in biases.items()} | {"scale": reads(1), "shape": reads(shape)}
    stated["scratch"] = writes((PARTS - 1) * part + most(used, entry(places["numbers"]) + NUMBERS))
    blocks = ceil(queries, panels["queries"])
    frame.states(
        stated,
        needs,
        at_least(1, heads, queries, keys),
        fits(batches * heads * blocks * PARTS + blocks, packed + panels["keys"], queries + panels["queries"]),
        fits(keys * (ceil(keys, _PIECE) + 1), values + panels["keys"], depth + panels["keys"]),
    )


_PIECE = 128
"""Fewer keys than `attention.py` passes over at a time."""
