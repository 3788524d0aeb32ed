"""The families of models: everything that is said of one, in one record.

The zoo takes options and constructor from here; the import of checkpoints takes layouts, what weights tell, and the
role of every option. Nothing here imports torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dvexport.models.checkpoints.layouts import (
    Layout,
    infer_mobilenet,
    infer_resnet,
    mobilenet_name,
    recognise,
    resnet_name,
)
from dvexport.models.checkpoints.transformer_layouts import (
    infer_video_swin,
    infer_vit,
    recognise_transformer,
    swin_name,
    vit_name,
)
from dvexport.models.config import MobileNetConfig, ResNetConfig, VideoSwinConfig, ViTConfig

__all__ = ["FAMILIES", "Family", "layout_of"]


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: as the zoo and layouts call it.
        config: the frozen dataclass of its options.
        model: `module:class`, imported when a model is built.
        infer: returns the options that names and shapes of a layout's weights tell.
        likely: returns the zoo name of the model that such options describe, None if there is none.
        roles: the role of every option, see `dvexport.models.checkpoints.untold`.
        identity: options that make one zoo model another.
        transformer: it reads a clip as tokens, and its size may be given by options instead of by its name.
    """

    name: str
    config: type
    model: str
    infer: Callable[[Layout, str], dict[str, Any]]
    likely: Callable[[Mapping[str, Any]], str | None]
    roles: Mapping[str, str]
    identity: tuple[str, ...] = ()
    transformer: bool = False

    def build(self, config: Any, name: str) -> Any:
        """Return the model, a `VideoModel` with random weights."""
        module, _, attribute = self.model.partition(":")
        return getattr(importlib.import_module(module), attribute)(config, name)


_ALL = (
    Family(
        name="resnet",
        config=ResNetConfig,
        model="dvexport.models.networks.resnet:ResNet",
        infer=infer_resnet,
        likely=resnet_name,
        roles={
            **dict.fromkeys(("depth", "width", "classes", "channel_gates", "tile_gates", "enabled_stages"), "inferred"),
            **dict.fromkeys(
                ("history", "skipping", "hidden", "hidden_quota", "gate_bn", "shared_policies"), "inferred"
            ),
            **dict.fromkeys(("shift", "shift_div", "shift_place", "gate_relu", "gate_pool", "frames", "size"), "asked"),
            "semantics": "named",
            "sampling": "chosen",
            "tau": "training",
            "dropout": "training",
        },
        identity=("depth", "channel_gates", "tile_gates"),
    ),
    Family(
        name="mobilenet",
        config=MobileNetConfig,
        model="dvexport.models.networks.mobilenet:MobileNetV2",
        infer=infer_mobilenet,
        likely=mobilenet_name,
        roles={
            **dict.fromkeys(("width", "classes"), "inferred"),
            **dict.fromkeys(("shift_div", "frames", "size"), "asked"),
            "shift": "named",
            "dropout": "training",
        },
    ),
    Family(
        name="vit",
        config=ViTConfig,
        model="dvexport.models.networks.vit:VisionTransformer",
        infer=infer_vit,
        likely=vit_name,
        roles={
            **dict.fromkeys(
                ("depth", "embed_dim", "mlp_ratio", "patch", "tubelet", "classes", "mean_pooling"), "inferred"
            ),
            **dict.fromkeys(("heads", "frames", "size"), "asked"),
            **dict.fromkeys(("norm_eps", "head_eps"), "fixed"),
            **dict.fromkeys(("drop_path", "dropout"), "training"),
            "views": "chosen",
            **{f"sta_{name}": "chosen" for name in ("r", "groups", "stages", "direction", "method", "seed")},
        },
        identity=("embed_dim", "depth"),
        transformer=True,
    ),
    Family(
        name="video_swin",
        config=VideoSwinConfig,
        model="dvexport.models.networks.video_swin:VideoSwin",
        infer=infer_video_swin,
        likely=swin_name,
        roles={
            **dict.fromkeys(("embed_dim", "depths", "heads", "patch", "mlp_ratio", "classes"), "inferred"),
            **dict.fromkeys(("window", "frames", "size"), "asked"),
            **dict.fromkeys(("drop_path", "dropout"), "training"),
            "views": "chosen",
            **{f"sta_{name}": "chosen" for name in ("r", "method", "seed")},
        },
        identity=("embed_dim", "depths"),
        transformer=True,
    ),
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}
"""Every family by name."""


def layout_of(state: Mapping[str, Any], where: str) -> Layout:
    """Return what the keys of a state_dict are, under dvexport's names.

    Raises:
        CheckpointError: no known layout fits, or one that dvexport does not support does, by its name.
    """
    return recognise_transformer(state, where) or recognise(state, where)
