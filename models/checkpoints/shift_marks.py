"""How official TSM files mark what is shifted: the shifted module is wrapped, and its keys get a `.net.`.

TSM's code (`ops/temporal_shift.py`) wraps conv1 of every block (`--shift_place=blockres`), every block whole
(`--shift_place=block`), or in MobileNetV2 the first convolution of every block with a skip that expands its
input. The mark says that there is a shift and where; it says nothing of its direction or its share of the channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from dvexport.errors import CheckpointError

__all__ = ["shift_place"]

_PLACES = (
    (r"(layer\d\.\d+)\.conv1\.net\.weight", "conv1"),
    (r"(layer\d\.\d+)\.net\.(?!.*\.net\.).+", "in_place"),
    (r"(features\.\d+)\.conv\.0\.net\.weight", "conv1"),
)
"""What a marked key looks like, and the place (`ResNetConfig.shift_place`) that it stands for."""
_MOBILE_BLOCKS = frozenset(f"features.{i}" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16))
"""Blocks of MobileNetV2 with a skip connection that expand their input."""


def shift_place(keys: Iterable[str], mobile: bool, where: str) -> str | None:
    """Return where the file says that blocks are shifted, `conv1` or `in_place`; None if it marks nothing.

    Args:
        keys: names without `module.` and `base_model.`.
        mobile: they are a MobileNetV2's and not a ResNet's.
        where: the file, for errors.

    Raises:
        CheckpointError: the marks are of no kind that TSM's code writes, or only some blocks have them.
    """
    keys = list(keys)
    marked: dict[str, set[str]] = {}
    for key in keys:
        if ".net." in key:
            place, block = _mark(key, where)
            marked.setdefault(place, set()).add(block)
    if not marked:
        return None
    if len(marked) > 1:
        raise CheckpointError(
            "the checkpoint marks shifts of two kinds",
            where=where,
            why="; ".join(f"{place}: {', '.join(sorted(blocks)[:3])}" for place, blocks in sorted(marked.items())),
        )
    ((place, found),) = marked.items()
    wanted = _MOBILE_BLOCKS if mobile else {match[0] for key in keys if (match := re.match(r"layer\d\.\d+", key))}
    if place == "in_place":  # wrapped whole: nothing of a block stands outside
        found -= {match[0] for key in keys if (match := re.match(r"layer\d\.\d+(?=\.(?!net\.))", key))}
    differing = sorted(found ^ wanted)
    if differing:
        raise CheckpointError(
            "the checkpoint shifts other blocks than TSM does",
            where=where,
            why=f"{len(found)} blocks are marked, TSM shifts {len(wanted)}; they differ in {', '.join(differing[:3])}",
            hint="write a factory for your own model: docs/adding-a-model.md",
        )
    return place


def _mark(key: str, where: str) -> tuple[str, str]:
    """Return (place, block) of a key with a mark."""
    for pattern, place in _PLACES:
        if match := re.fullmatch(pattern, key):
            return place, match[1]
    raise CheckpointError(
        "the checkpoint marks a shift where TSM has none",
        where=f"{where}: {key}",
        hint="write a factory for your own model: docs/adding-a-model.md",
    )
