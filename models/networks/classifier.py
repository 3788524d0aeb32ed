"""What every network of the zoo tells `VideoModel` about itself."""

from __future__ import annotations

from typing import Any

from dvexport.models.base import imagenet_preprocess

__all__ = ["classifier_of_clips"]


def classifier_of_clips(config: Any, name: str, whole_clip: bool = False, views: str | None = None) -> dict[str, Any]:
    """Return the arguments of `VideoModel`: the input of the official checkpoints, and classes without names.

    Args:
        config: options of the network, with `size`, `frames`, `classes` and `causal`.
        name: how the zoo calls it.
        whole_clip: it reads a clip as one.
        views: the recipe of `dvexport.video.preprocess.RECIPES` by which its official test samples a video. It is
            taken if the options ask for `views="kinetics"`.
    """
    recipe = views if getattr(config, "views", None) == "kinetics" else None
    return {
        "name": name,
        "config": config,
        "preprocess": imagenet_preprocess(config.size, config.frames, recipe),
        "labels": [f"class {i}" for i in range(config.classes)],
        "causal": config.causal,
        "whole_clip": whole_clip,
    }
