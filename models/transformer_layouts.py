"""Key names and shapes of transformers' checkpoints: official VideoMAE (and STA) and Video-Swin.

Sources of the names: VideoMAE 14ef8d8 (`modeling_finetune.py`), Video-Swin db018fb (mmcv).
Hugging Face's layout comes in a directory: `dvexport.models.huggingface`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dvexport.errors import CheckpointError
from dvexport.models.layouts import Layout

__all__ = ["VIT_SIZES", "infer_video_swin", "infer_vit", "recognise_transformer", "swin_name", "vit_name"]

VIT_SIZES = {
    (384, 12): "vit_small",
    (768, 12): "vit_base",
    (1024, 24): "vit_large",
    (1280, 32): "vit_huge",
}
"""Zoo names by channels and depth."""
_VIT_HEADS = {768: 12, 1024: 16, 1280: 16}
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
        return _plain("official Video-Swin", "video_swin", _swin_keys(state))
    keys = _without_prefix(state)
    if any(re.match(r"blocks\.\d+\.attn\.", key) for key in keys):
        keys.pop("pos_embed", None)  # fixed sines and cosines, where a file has them
        return _plain("official VideoMAE", "vit", keys)
    return None


def _plain(kind: str, family: str, state: dict[str, Any]) -> Layout:
    return Layout(kind=kind, family=family, state=state, shifted=False, marks_shift=False, shared=False)


def _without_prefix(state: Mapping[str, Any]) -> dict[str, Any]:
    keys = dict(state)
    for prefix in _PREFIXES:
        if any(key.startswith((f"{prefix}blocks.", f"{prefix}patch_embed.")) for key in keys) or prefix == "module.":
            keys = {key.removeprefix(prefix): value for key, value in keys.items()}
    return keys


def _swin_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    """Drop mmcv's parts (`backbone.`, `cls_head.fc_cls`) and the index tables, which follow from the window."""
    keys = {}
    for key, value in state.items():
        name = key.removeprefix("module.").removeprefix("backbone.")
        name = "head." + name.removeprefix("cls_head.fc_cls.") if name.startswith("cls_head.fc_cls.") else name
        if not name.endswith("relative_position_index"):
            keys[name] = value
    return keys


def _shape(state: Mapping[str, Any], key: str, axes: int, where: str) -> tuple[int, ...]:
    if key not in state:
        raise CheckpointError("the checkpoint lacks a layer", where=f"{where}: {key}")
    shape = tuple(int(size) for size in state[key].shape)
    if len(shape) != axes:
        raise CheckpointError(
            "a layer of the checkpoint has another form", where=f"{where}: {key}", why=f"{shape} instead of {axes} axes"
        )
    return shape


def infer_vit(layout: Layout, where: str) -> dict[str, Any]:
    """Return the options of `ViTConfig` that names and shapes of the weights tell.

    Heads are among them only for widths at which everybody uses the same number.
    """
    state = layout.state
    dim, _, tubelet, patch, _ = _shape(state, "patch_embed.proj.weight", 5, where)
    facts: dict[str, Any] = {
        "depth": _count(state, r"blocks\.(\d+)\."),
        "embed_dim": dim,
        "patch": patch,
        "tubelet": tubelet,
        "mlp_ratio": _shape(state, "blocks.0.mlp.fc1.weight", 2, where)[0] / dim,
        "classes": _shape(state, "head.weight", 2, where)[0],
        "mean_pooling": "fc_norm.weight" in state,
    }
    if dim in _VIT_HEADS:
        facts["heads"] = _VIT_HEADS[dim]
    return facts


def infer_video_swin(layout: Layout, where: str) -> dict[str, Any]:
    """Return the options of `VideoSwinConfig` that names and shapes of the weights tell."""
    state = layout.state
    dim, _, *patch = _shape(state, "patch_embed.proj.weight", 5, where)
    stages = _count(state, r"layers\.(\d+)\.")
    depths = tuple(_count(state, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages))
    tables = [_shape(state, f"layers.{s}.blocks.0.attn.relative_position_bias_table", 2, where) for s in range(stages)]
    facts: dict[str, Any] = {
        "embed_dim": dim,
        "depths": depths,
        "heads": tuple(heads for _, heads in tables),
        "patch": tuple(patch),
        "classes": _shape(state, "head.weight", 2, where)[0],
    }
    # A window of W x 7 x 7 has (2W - 1) x 13 x 13 relative positions.
    frames, rest = divmod(tables[0][0], 13 * 13)
    if not rest and frames % 2:
        facts["window"] = ((frames + 1) // 2, 7, 7)
    return facts


def _count(state: Mapping[str, Any], pattern: str) -> int:
    return len({match[1] for key in state if (match := re.match(pattern, key))})


def vit_name(facts: Mapping[str, Any]) -> str | None:
    """Return the zoo name of a size, None if the zoo has no such size."""
    return VIT_SIZES.get((facts["embed_dim"], facts["depth"]))


def swin_name(facts: Mapping[str, Any]) -> str | None:
    """Return the zoo name of a size, None if the zoo has no such size."""
    return _SWIN_SIZES.get((facts["embed_dim"], facts["depths"]))
