"""The published FLOPs of STA recomputed: tables 1 to 4 of its poster, on the operators of the exported graphs.

Counted by fvcore's rules, by which the tables were made: 1 for a multiply-accumulate of convolutions, linear
layers and matrix products, 5 for an element of a layer norm, nothing for the rest. What selects the
tokens counts too. No weights are needed: a graph is traced with memory that is never touched.

Blocks between two prunings are alike, so a graph is traced with one block of each kind, and its operators
count as often as the model has such blocks. A test compares this with whole graphs.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from dvexport.models import zoo
from dvexport.models.config import VideoSwinConfig, ViTConfig
from dvexport.models.settings import parse_settings

__all__ = ["PUBLISHED", "TokenFigure", "operators", "token_figures", "video_swin_flops", "vit_flops"]

PUBLISHED: dict[str, tuple[str, dict[int, tuple[str, str]]]] = {
    "vit_small": ("ViT-S", {0: ("56.95", "57"), 32: ("41.91", "42"), 48: ("35.12", "35"), 64: ("28.89", "29")}),
    "vit_base": ("ViT-B", {0: ("180.49", "180"), 32: ("136.52", "136"), 48: ("116.05", "116"), 64: ("96.70", "96")}),
    "vit_large": ("ViT-L", {0: ("597.22", "597"), 32: ("446.92", "446"), 48: ("376.35", "376"), 64: ("308.96", "308")}),
    "vit_huge": (
        "ViT-H",
        {0: ("1191.64", "1192"), 32: ("891.07", "890"), 48: ("748.71", "748"), 64: ("611.84", "611")},
    ),
    "video_swin_tiny": (
        "Video-Swin-T",
        {0: ("88.06", "88"), 192: ("68.02", "68"), 256: ("61.18", "61"), 320: ("54.34", "54")},
    ),
    "video_swin_small": (
        "Video-Swin-S",
        {0: ("166.12", "166"), 192: ("121.60", "121"), 256: ("106.59", "106"), 320: ("91.57", "91")},
    ),
    "video_swin_base": (
        "Video-Swin-B",
        {0: ("281.92", "282"), 192: ("202.55", "202"), 256: ("175.89", "176"), 320: ("149.24", "149")},
    ),
    "video_swin_base_ssv2": (
        "Video-Swin-B, SSv2",
        {0: ("320.95", "321"), 192: ("241.57", "241"), 256: ("214.92", "215"), 320: ("188.26", "188")},
    ),
}
"""What the graph must give and what was published, in GFLOPs, by zoo name and r."""


@dataclass(frozen=True)
class TokenFigure:
    """A cell of the tables.

    Attributes:
        label: how the table names the model.
        r: tokens that a group drops.
        value: GFLOPs of the graph.
        reference: what it must be, to as many digits.
        published: the published value, as printed.
    """

    label: str
    r: int
    value: float
    reference: str
    published: str

    @property
    def name(self) -> str:
        """What is counted."""
        return f"{self.label}, r = {self.r}"


def token_figures() -> list[TokenFigure]:
    """Return every cell (half a minute, no weights)."""
    return [
        TokenFigure(label, r, flops(name, r) / 1e9, reference, published)
        for name, (label, row) in PUBLISHED.items()
        for r, (reference, published) in row.items()
    ]


def flops(name: str, r: int) -> int:
    """Return the FLOPs of a zoo model that drops r tokens, for one clip."""
    info = zoo.describe(name)
    if info.family == "vit":
        return vit_flops(ViTConfig(**parse_settings(ViTConfig, {**info.options, "sta_r": r})))
    return video_swin_flops(VideoSwinConfig(**parse_settings(VideoSwinConfig, {**info.options, "sta_r": r})))


def vit_flops(config: ViTConfig) -> int:
    """Return the FLOPs of a clip: one block before each pruning place and one after, as often as there are."""
    stages = config.sta_stages or (0, config.depth // 3, 2 * config.depth // 3)
    last = (-1, *stages, config.depth - 1)
    repeats = {f"blocks.{i}.": after - before for i, (before, after) in enumerate(itertools.pairwise(last))}
    short = {"depth": len(stages) + 1, "sta_stages": tuple(range(len(stages)))}
    return _weighted(operators("vit", {**vars(config), **short}), repeats)


def video_swin_flops(config: VideoSwinConfig) -> int:
    """Return the FLOPs of a clip: two blocks of each stage, each as often as its half of the stage."""
    repeats = {}
    for stage, depth in enumerate(config.depths):
        repeats[f"layers.{stage}.blocks.0."] = depth // 2
        repeats[f"layers.{stage}.blocks.1."] = depth - depth // 2
    return _weighted(operators("video_swin", {**vars(config), "depths": (2, 2, 2, 2)}), repeats)


def _weighted(counts: Mapping[str, int], repeats: Mapping[str, int]) -> int:
    """Sum up; operators inside a block that stands for several count for each of them."""
    total = 0
    for module, count in counts.items():
        block = re.match(r"(?:layers\.\d+\.)?blocks\.\d+\.", module)
        total += count * (repeats[block[0]] if block else 1)
    return total


def operators(family: str, options: Mapping[str, Any]) -> Counter[str]:
    """Trace a model and return the FLOPs of its operators by the module that they are in.

    Args:
        family: `vit` or `video_swin`.
        options: every option of the family.
    """
    import torch

    from dvexport.models.networks.video_swin import VideoSwin
    from dvexport.models.networks.vit import VisionTransformer

    with torch.device("meta"):
        model: Any = (
            VisionTransformer(ViTConfig(**options)) if family == "vit" else VideoSwin(VideoSwinConfig(**options))
        )
    # Memory that is reserved and never written: tracing looks at shapes only.
    model = model.to_empty(device="cpu").eval()
    clip = torch.empty(model.config.frames, 3, *model.config.size)
    with torch.no_grad():
        program = torch.export.export(model, (clip,), strict=False)
    counts: Counter[str] = Counter()
    for node in program.graph.nodes:
        if node.op == "call_function" and (cost := _cost(node)):
            stack = [path for path, _ in node.meta.get("nn_module_stack", {"": ("", None)}).values()]
            counts[stack[-1]] += cost
    return counts


def _cost(node: Any) -> int:
    """FLOPs of one operator."""
    name = str(node.target)
    if name == "aten.layer_norm.default":
        return 5 * node.meta["val"].numel()
    if name in ("aten.linear.default", "aten.conv2d.default"):
        return prod(node.args[1].meta["val"].shape[1:]) * node.meta["val"].numel()
    if name == "aten.matmul.default":
        return node.args[0].meta["val"].shape[-1] * node.meta["val"].numel()
    return 0
