"""Video transformers as Hugging Face's `save_pretrained` leaves them: a directory.

`config.json` tells the architecture, `model.safetensors` (or `pytorch_model.bin`, whole or in shards) holds
the weights, `preprocessor_config.json` the input. Only `VideoMAEForVideoClassification` is read. What differs
from the official model is taken from the config: epsilon (1e-12 in the blocks, 1e-5 before the
classifier) and heads (files converted from ViT-S say 16 where the original has 6).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvexport.errors import CheckpointError, UntoldError, UsageError
from dvexport.files import read_text
from dvexport.models.checkpoints.checkpoint import read_checkpoint
from dvexport.models.config import ViTConfig
from dvexport.models.settings import parse_settings
from dvexport.video.preprocess import Preprocess

__all__ = ["directory_digest", "load_directory"]

_ARCHITECTURE = "VideoMAEForVideoClassification"
_HEAD_EPS = 1e-5
"""torch's default, which the classifier's norm has there."""
_CONFIG = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 16,
    "tubelet_size": 2,
    "num_frames": 16,
    "image_size": 224,
    "num_channels": 3,
    "layer_norm_eps": 1e-12,
    "use_mean_pooling": True,
    "hidden_act": "gelu",
}
"""The library's defaults, for keys that a config leaves out."""
_BIASES = ("qkv_bias", "qv_bias")
"""Whether queries and values have biases, as its versions call it, the first before the second; by default they do."""
_CLASSIFIER = "classifier.weight"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_PREPROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")
_BILINEAR = 2
"""The library's number of the interpolation."""
_PREPROCESSING = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": _BILINEAR,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
"""The library's defaults of `VideoMAEImageProcessor`, for keys that a file leaves out."""

_ENDS = {
    "patch_embed.proj": "videomae.embeddings.patch_embeddings.projection",
    "norm": "videomae.layernorm",
    "fc_norm": "fc_norm",
    "head": "classifier",
}
_LAYER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def load_directory(folder: str | Path, settings: Mapping[str, Any], *, assume_defaults: bool = False) -> Any:
    """Return the model of a directory, with its weights, labels and preprocessing, in evaluation mode.

    Args:
        folder: what `save_pretrained` wrote.
        settings: options that the config leaves open, such as `sta.r`; one it contradicts is an error.
        assume_defaults: without a `preprocessor_config.json`, take ImageNet's mean and deviation.

    Raises:
        UntoldError: nothing tells how frames are normalised.
        CheckpointError: no config, another architecture, weights missing, left over or of another size.
        UsageError: an option that is unknown or contradicts the config.
    """
    from dvexport.models.checkpoints.importers import ImportReport, contradiction, load_weights
    from dvexport.models.fits import check_fits
    from dvexport.models.networks.vit import VisionTransformer

    folder = Path(folder)
    about = _config(folder)
    state, source = _weights(folder)
    options = _options(about, state, folder)
    parsed = parse_settings(ViTConfig, settings)
    for option, value in parsed.items():
        if option in options and options[option] != value:
            said = {option: options[option]}
            raise contradiction({option: value}, said, "directory", str(folder / "config.json"), "its config says")
    weights = _own_names(state, options, about, str(source))
    config = ViTConfig(**{**options, **parsed})
    check_fits(str(folder), lambda: VisionTransformer(config, "huggingface"))
    model = VisionTransformer(config, "huggingface")
    load_weights(model, weights, where=str(source))
    if labels := _labels(about, options["classes"], folder):
        model.set_labels(labels)
    model.preprocess, assumed = _preprocess(folder, model.preprocess, assume_defaults)
    given = {option: value for option, value in parsed.items() if option not in options}
    model.import_report = ImportReport(str(folder), f"Hugging Face {_ARCHITECTURE}", options, given, assumed)
    return model.eval()


def directory_digest(folder: str | Path) -> str:
    """Return one SHA-256 of every file that a model is read from; CheckpointError if there is none."""
    folder = Path(folder)
    names = [name for name in ("config.json", *_PREPROCESSORS) if (folder / name).is_file()]
    names += [path.name for path in _weight_files(folder)]
    digest = hashlib.sha256()
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError("can't read a file of the model", where=str(path), why=str(error)) from None
    if not isinstance(content, dict):
        raise CheckpointError("can't read a file of the model", where=str(path), why="it holds no JSON object")
    return content


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            "the directory holds no model of Hugging Face's library",
            where=str(folder),
            why="it has no config.json",
            hint="give the directory that save_pretrained wrote, or a zoo name and --checkpoint FILE",
        )
    about = _json(path)
    named = about.get("architectures") or about.get("model_type", "nothing")
    named = named if isinstance(named, list) else [named]
    if about.get("model_type", "videomae") != "videomae" or named != [_ARCHITECTURE]:
        raise CheckpointError(
            "the directory holds a model that dvexport does not read",
            where=str(path),
            why=f"its architecture is {', '.join(map(str, named))}; {_ARCHITECTURE} is read",
            hint="fine-tune it for classification, or write a factory: docs/adding-a-model.md",
        )
    return {**_CONFIG, **{key: value for key, value in about.items() if value is not None}}


def _options(about: Mapping[str, Any], state: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the options of `ViTConfig` that a config tells; where it is silent about classes, the weights do."""
    path = str(folder / "config.json")
    for key, wanted in (("hidden_act", "gelu"), ("num_channels", 3)):
        if about[key] != wanted:
            raise CheckpointError(
                f"the model has {key}={about[key]}, which dvexport does not read", where=path, why=f"{wanted} is read"
            )
    try:
        patch = {about["patch_size"]} if isinstance(about["patch_size"], int) else set(about["patch_size"])
        size = about["image_size"]
        options = {
            "depth": int(about["num_hidden_layers"]),
            "embed_dim": int(about["hidden_size"]),
            "heads": int(about["num_attention_heads"]),
            "mlp_ratio": about["intermediate_size"] / about["hidden_size"],
            "patch": int(*patch),
            "tubelet": int(about["tubelet_size"]),
            "classes": _classes(about, state),
            "frames": int(about["num_frames"]),
            "size": (size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
            "norm_eps": float(about["layer_norm_eps"]),
            "head_eps": _HEAD_EPS,
            "mean_pooling": bool(about["use_mean_pooling"]),
        }
        ViTConfig(**options)
    except (TypeError, ValueError, IndexError, ZeroDivisionError, OverflowError, UsageError) as error:
        raise CheckpointError("the config describes no VideoMAE", where=path, why=str(error).splitlines()[0]) from None
    return options


def _classes(about: Mapping[str, Any], state: Mapping[str, Any]) -> int:
    """Return the number of classes: that of the names, the one that is told, or that of the classifier's rows."""
    if "id2label" in about:
        return len(about["id2label"])
    if "num_labels" in about:
        return int(about["num_labels"])
    return len(state[_CLASSIFIER]) if _CLASSIFIER in state and state[_CLASSIFIER].dim() else 2


def _labels(about: Mapping[str, Any], classes: int, folder: Path) -> list[str]:
    names = about.get("id2label") or {}
    try:
        by_number = {int(number): str(name) for number, name in names.items()}
        return [by_number[number] for number in range(classes)] if by_number else []
    except (AttributeError, KeyError, ValueError) as error:
        raise CheckpointError(
            "the labels are not numbered from 0 on", where=f"{folder / 'config.json'}: id2label", why=repr(error)
        ) from None


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that hold weights, an index first."""
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            "the directory holds no weights", where=str(folder), why=f"looked for {', '.join(_WEIGHTS)}"
        )
    if found.suffix != ".json":
        return [found]
    shards = _json(found).get("weight_map")
    names = sorted(set(shards.values())) if isinstance(shards, dict) and shards else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError("the index of the weights names no files beside it", where=str(found))
    return [found, *(folder / name for name in names)]


def _weights(folder: Path) -> tuple[dict[str, Any], Path]:
    files = _weight_files(folder)
    state: dict[str, Any] = {}
    for path in files:
        if path.suffix == ".json":
            continue
        shard = read_checkpoint(path).state
        if again := sorted(set(shard) & set(state)):
            raise CheckpointError("a weight stands in two files", where=str(path), why=", ".join(again[:3]))
        state.update(shard)
    return state, files[0]


def _own_names(
    state: Mapping[str, Any], options: Mapping[str, Any], about: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return the weights under dvexport's names; CheckpointError for those missing or left over."""
    import torch

    from dvexport.models.checkpoints.layouts import renamed

    state = renamed(state, lambda key: re.sub(r"attention\.(query|value)\.bias$", _old_bias, key), where)
    # A bias of the keys adds the same to every logit of a query, which its softmax takes off again.
    state = {key: value for key, value in state.items() if not key.endswith("attention.key.bias")}
    biased = bool(next((about[key] for key in _BIASES if key in about), True))
    sources = _sources(options, biased)
    wanted = {key for keys in sources.values() for key in keys}
    missing, extra = sorted(wanted - set(state)), sorted(set(state) - wanted)
    found = [f"{len(keys)} {kind}: {', '.join(keys[:3])}" for kind, keys in (("missing", missing), ("left over", extra))
             if keys]  # fmt: skip
    if found:
        raise CheckpointError(
            "the weights don't fit config.json",
            where=where,
            why="; ".join(found),
            hint="save the model and its config together, with save_pretrained",
        )
    weights = {own: torch.cat([state[key] for key in keys]) for own, keys in sources.items()}
    if not biased:
        for layer in range(options["depth"]):
            for name in ("q_bias", "v_bias"):
                weights[f"blocks.{layer}.attn.{name}"] = torch.zeros(options["embed_dim"])
    return weights


def _old_bias(match: re.Match[str]) -> str:
    return f"attention.{match[1][0]}_bias"


def _sources(options: Mapping[str, Any], biased: bool) -> dict[str, list[str]]:
    """Return for each of dvexport's names the stored ones, to be joined in this order."""
    unused = "norm" if options["mean_pooling"] else "fc_norm"
    pairs = {own: stored for own, stored in _ENDS.items() if own != unused}
    for layer in range(options["depth"]):
        pairs |= {f"blocks.{layer}.{own}": f"videomae.encoder.layer.{layer}.{name}" for own, name in _LAYER.items()}
    sources = {f"{own}.{part}": [f"{name}.{part}"] for own, name in pairs.items() for part in ("weight", "bias")}
    for layer in range(options["depth"]):
        stem = f"videomae.encoder.layer.{layer}.attention.attention"
        sources[f"blocks.{layer}.attn.qkv.weight"] = [f"{stem}.{name}.weight" for name in ("query", "key", "value")]
        if biased:
            sources |= {f"blocks.{layer}.attn.{name}": [f"{stem}.{name}"] for name in ("q_bias", "v_bias")}
    return sources


def _preprocess(folder: Path, built: Preprocess, assume_defaults: bool) -> tuple[Preprocess, dict[str, Any]]:
    """Return the preprocessing, and what of it had to be assumed."""
    path = next((folder / name for name in _PREPROCESSORS if (folder / name).is_file()), None)
    if path is None:
        if not assume_defaults:
            raise UntoldError(
                "nothing in the directory tells how frames are normalised, and the numbers depend on it",
                where=str(folder),
                why=f"it has no {_PREPROCESSORS[0]}",
                hint=f"put the {_PREPROCESSORS[0]} of the training beside config.json, or --assume-defaults "
                "(assume_defaults=True) for ImageNet's mean and deviation",
                settings=[],
            )
        return built, {"mean": built.mean, "std": built.std}
    about = {**_PREPROCESSING, **{key: value for key, value in _json(path).items() if value is not None}}
    try:
        _check_processing(about, built.size, str(path))
        normalised = about["do_normalize"]
        mean = tuple(about["image_mean"]) if normalised else (0.0, 0.0, 0.0)
        std = tuple(about["image_std"]) if normalised else (1.0, 1.0, 1.0)
        return dataclasses.replace(built, mean=mean, std=std, resize=_short_side(about["size"])), {}
    except (TypeError, KeyError, ValueError, UsageError) as error:
        raise CheckpointError(
            "can't read the preprocessing", where=str(path), why=str(error).splitlines()[0] or type(error).__name__
        ) from None


def _check_processing(about: Mapping[str, Any], crop: tuple[int, int], where: str) -> None:
    """Raise CheckpointError for steps other than resize, centre crop, 0..1 and mean: the numbers would be others."""
    wanted: dict[str, Any] = {
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale"), True),
        "resample": _BILINEAR,
        "crop_size": crop,
    }
    given = about["crop_size"]
    sides = (given, given) if isinstance(given, int) else (int(given["height"]), int(given["width"]))
    said = {**about, "crop_size": sides, "rescale_factor": round(float(about["rescale_factor"]), 8)}
    for key, value in {**wanted, "rescale_factor": round(1 / 255, 8)}.items():
        if said[key] != value:
            raise CheckpointError(
                f"the preprocessing has {key}={said[key]}, which dvexport does not do", where=where,
                why=f"{value} is done",
            )  # fmt: skip


def _short_side(size: Any) -> int:
    """Return what the short side is resized to; sides of their own would change the picture's proportions."""
    return int(size) if isinstance(size, int) else int(size["shortest_edge"])
