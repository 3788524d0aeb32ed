"""Key names and shapes of transformers' checkpoints: official VideoMAE (and STA) and Video-Swin.

Sources of the names: VideoMAE 14ef8d8 (`modeling_finetune.py`), Video-Swin db018fb (mmcv).
Hugging Face's layout comes in a directory: `dvexport.models.checkpoints.huggingface`. Tables that follow from the
options,
positions and places in a window, are no weights: they are compared with those that dvexport makes, and refused
if they are others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from dvexport.errors import CheckpointError
from dvexport.models.checkpoints.layouts import Layout, check_colours, renamed, shape_of

__all__ = ["VIT_HEADS", "VIT_SIZES", "infer_video_swin", "infer_vit", "recognise_transformer", "swin_name", "vit_name"]

VIT_SIZES = {
    (384, 12): "vit_small",
    (768, 12): "vit_base",
    (1024, 24): "vit_large",
    (1280, 32): "vit_huge",
}
"""Zoo names by channels and depth."""
VIT_HEADS = {768: 12, 1024: 16, 1280: 16}
"""Heads by channels, where official and converted files agree; at 384 they don't (6 and 16)."""
_SWIN_SIZES = {
    (96, (2, 2, 6, 2)): "video_swin_tiny",
    (96, (2, 2, 18, 2)): "video_swin_small",
    (128, (2, 2, 18, 2)): "video_swin_base",
}
_PREFIXES = ("module.", "model.", "backbone.", "encoder.")


def recognise_transformer(state: Mapping[str, Any], where: str) -> Layout | None:
    """Rename the keys of a transformer's state_dict to dvexport's own; None if it is no transformer's.

    Raises:
        CheckpointError: weights of a Hugging Face model, which need their config.json.
    """
    if any(re.match(r"(module\.)?videomae\.", key) for key in state):
        raise CheckpointError(
            "weights of a Hugging Face model need its config.json, which tells heads and epsilon",
            where=where,
            hint="export the directory that save_pretrained wrote: dvexport export DIR",
        )
    if any("relative_position_bias_table" in key for key in state):
        return _swin(renamed(state, _swin_name, where), where)
    keys = _without_prefix(state, where)
    if any(re.match(r"blocks\.\d+\.attn\.", key) for key in keys):
        positions = keys.pop("pos_embed", None)
        if positions is not None:
            _check_positions(positions, where)
        return Layout("official VideoMAE", "vit", keys, positions=positions)
    return None


def _without_prefix(state: Mapping[str, Any], where: str) -> dict[str, Any]:
    keys = dict(state)
    for prefix in _PREFIXES:
        if any(key.startswith((f"{prefix}blocks.", f"{prefix}patch_embed.")) for key in keys) or prefix == "module.":
            keys = renamed(keys, lambda key, prefix=prefix: key.removeprefix(prefix), where)  # type: ignore[misc]
    return keys


def _check_positions(positions: Any, where: str) -> None:
    """Raise CheckpointError unless a stored table of positions is the fixed one: learned ones are other weights."""
    from dvexport.models.networks.vit import position_table

    if positions.ndim != 3 or not positions.allclose(position_table(*positions.shape[1:]), atol=1e-4):
        raise CheckpointError(
            "the checkpoint has positions of its own",
            where=f"{where}: pos_embed",
            why="they are learned (use_learnable_pos_emb) or interpolated; dvexport has the fixed sines and cosines",
            hint="write a factory for your own model: docs/adding-a-model.md",
        )


def _swin_name(key: str) -> str:
    """Return a key without mmcv's parts: `backbone.`, `cls_head.fc_cls`."""
    name = key.removeprefix("module.").removeprefix("backbone.")
    return re.sub(r"^cls_head\.fc_cls\.", "head.", name)


def _swin(state: dict[str, Any], where: str) -> Layout:
    """Take the tables of places in a window from the weights: they follow from the window, and tell it."""
    tables = {key: state.pop(key) for key in list(state) if key.endswith("relative_position_index")}
    window = None
    for key, table in tables.items():
        found = _window_of(table)
        if found is None or window not in (None, found):
            raise CheckpointError(
                "a table of the checkpoint is that of no window",
                where=f"{where}: {key}",
                why=f"a window of {found} stands beside one of {window}" if found else f"{tuple(table.shape)} integers",
            )
        window = found
    return Layout("official Video-Swin", "video_swin", state, window=window)


def _window_of(table: Any) -> tuple[int, int, int] | None:
    """Return the window that a table of relative positions is made for; None if it is no such table."""
    import torch

    from dvexport.models.networks.video_swin import relative_positions

    if table.ndim != 2 or len(table) != table.shape[1] or not len(table):
        return None
    places = len(table)
    sides = [side for side in range(1, places + 1) if places % side == 0]
    for window in ((d, h, places // d // h) for d in sides for h in sides if places % (d * h) == 0):
        # The first and the last place are as far apart as places are, which gives the number of the last row.
        last = math.prod(2 * side - 1 for side in window) - 1
        if int(table[-1, 0]) == last and torch.equal(table.to(torch.int64), relative_positions(window)):
            return window
    return None


def infer_vit(layout: Layout, where: str) -> dict[str, Any]:
    """Return the options of `ViTConfig` that names and shapes of the weights tell.

    Heads are among them only for widths at which everybody uses the same number.
    """
    state = layout.state
    dim, _, tubelet, patch, across = shape_of(state, "patch_embed.proj.weight", 5, where)
    check_colours(state, "patch_embed.proj.weight", where)
    if patch != across:
        raise CheckpointError("the checkpoint has patches that are not square", where=where, why=f"{patch}x{across}")
    facts: dict[str, Any] = {
        "depth": _count(state, r"blocks\.(\d+)\."),
        "embed_dim": dim,
        "patch": patch,
        "tubelet": tubelet,
        "mlp_ratio": shape_of(state, "blocks.0.mlp.fc1.weight", 2, where)[0] / dim,
        "classes": shape_of(state, "head.weight", 2, where)[0],
        "mean_pooling": "fc_norm.weight" in state,
    }
    if dim in VIT_HEADS:
        facts["heads"] = VIT_HEADS[dim]
    return facts


def infer_video_swin(layout: Layout, where: str) -> dict[str, Any]:
    """Return the options of `VideoSwinConfig` that names and shapes of the weights tell."""
    state = layout.state
    dim, _, *patch = shape_of(state, "patch_embed.proj.weight", 5, where)
    stages = _count(state, r"layers\.(\d+)\.")
    depths = tuple(_count(state, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages))
    tables = [
        shape_of(state, f"layers.{s}.blocks.0.attn.relative_position_bias_table", 2, where) for s in range(stages)
    ]
    facts: dict[str, Any] = {
        "embed_dim": dim,
        "depths": depths,
        "heads": tuple(heads for _, heads in tables),
        "patch": tuple(patch),
        "mlp_ratio": shape_of(state, "layers.0.blocks.0.mlp.fc1.weight", 2, where)[0] / dim,
        "classes": shape_of(state, "head.weight", 2, where)[0],
    }
    check_colours(state, "patch_embed.proj.weight", where)
    if layout.window is not None:
        facts["window"] = layout.window
    return facts


def _count(state: Mapping[str, Any], pattern: str) -> int:
    return len({match[1] for key in state if (match := re.match(pattern, key))})


def vit_name(facts: Mapping[str, Any]) -> str | None:
    """Return the zoo name of a size, None if the zoo has no such size."""
    return VIT_SIZES.get((facts["embed_dim"], facts["depth"]))


def swin_name(facts: Mapping[str, Any]) -> str | None:
    """Return the zoo name of a size, None if the zoo has no such size."""
    return _SWIN_SIZES.get((facts["embed_dim"], facts["depths"]))
