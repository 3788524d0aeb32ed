"""The models by name: what there is, what its options are, and how to make one.

Nothing here imports torch before a model is made, so that names can be listed and completed fast.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvexport.errors import UsageError, unknown_name
from dvexport.files import read_text
from dvexport.models.checkpoints.checkpoint import read_metadata
from dvexport.models.checkpoints.families import FAMILIES
from dvexport.models.fits import check_fits, weight_bytes_of
from dvexport.models.settings import option_names, parse_settings
from dvexport.video.preprocess import Preprocess

if TYPE_CHECKING:
    from dvexport.models.base import VideoModel
    from dvexport.models.described import Description

__all__ = [
    "DIRECTORY",
    "ModelInfo",
    "create",
    "describe",
    "names",
    "options",
    "parsed_settings",
    "saved_directory",
    "weight_bytes",
    "weights_folder",
]

DIRECTORY = "huggingface"
"""How bundles call a model that came from a directory; its checkpoint is the directory."""
_DIRECTORY_FAMILY = "vit"


@dataclass(frozen=True)
class ModelInfo:
    """What the zoo says of a model.

    Attributes:
        name: how to ask for it.
        summary: one line for a person.
        family: `resnet`, `mobilenet`, `vit`, `video_swin`, or `factory` for a model of the user's.
        options: every option with its value by default.
        weights: the shipped weights, None for an architecture to be given a checkpoint.
        architecture: zoo name of the architecture that shipped weights belong to.
        accuracy: top-1 accuracy in 0..1 of the shipped weights on their validation set.
        labels: class names of the shipped weights.
    """

    name: str
    summary: str
    family: str
    options: dict[str, Any]
    weights: Path | None = None
    architecture: str = ""
    accuracy: float | None = None
    labels: list[str] = field(default_factory=list)


_ADAFUSE18 = {"channel_gates": True, "hidden": 512, "shared_policies": True, "shift_place": "block"}
_ADAFUSE50 = {
    "depth": 50,
    "channel_gates": True,
    "hidden_quota": 196608,
    "shared_policies": True,
    "shift_place": "block",
}
_ADAFUSE50_LAST = {
    "depth": 50,
    "channel_gates": True,
    "hidden": 1024,
    "enabled_stages": (3,),
    "shift_place": "block",
}
_SWIN_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}
_TILES = {"tile_gates": True}

_ZOO: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tsn_resnet18": ("resnet", "TSN, ResNet-18: frame by frame, the static baseline", {}),
    "tsn_resnet50": ("resnet", "TSN, ResNet-50: frame by frame, the static baseline", {"depth": 50}),
    "tsm_resnet18": ("resnet", "TSM, ResNet-18, offline (clip mode only)", {"shift": "bidirectional"}),
    "tsm_resnet50": (
        "resnet",
        "TSM, ResNet-50, offline (clip mode only)",
        {"depth": 50, "shift": "bidirectional"},
    ),
    "tsm_online_resnet18": ("resnet", "TSM, ResNet-18, online", {"shift": "online"}),
    "tsm_online_resnet50": ("resnet", "TSM, ResNet-50, online", {"depth": 50, "shift": "online"}),
    "tsm_mobilenetv2": (
        "mobilenet",
        "TSM, MobileNetV2, offline (clip mode only)",
        {"shift": "bidirectional"},
    ),
    "tsm_online_mobilenetv2": (
        "mobilenet",
        "TSM, MobileNetV2, online: the official gesture demo",
        {"shift": "online"},
    ),
    "adafuse_resnet18": ("resnet", "AdaFuse, ResNet-18, shared policies (15.6 M)", _ADAFUSE18),
    "adafuse_resnet50": ("resnet", "AdaFuse, ResNet-50, hidden quota 196608 (37.7 M)", _ADAFUSE50),
    "adafuse_resnet50_last": ("resnet", "AdaFuse, ResNet-50, gates in layer4 only (39.1 M)", _ADAFUSE50_LAST),
    "dstep_resnet18": ("resnet", "D-STEP, ResNet-18, as its code does", {**_ADAFUSE18, **_TILES}),
    "dstep_resnet50": ("resnet", "D-STEP, ResNet-50, as its code does", {**_ADAFUSE50, **_TILES}),
    "dstep_paper_resnet18": (
        "resnet",
        "D-STEP, ResNet-18, as its paper says (policy under the mask)",
        {**_ADAFUSE18, **_TILES, "semantics": "paper"},
    ),
    "dstep_paper_resnet50": (
        "resnet",
        "D-STEP, ResNet-50, as its paper says (policy under the mask)",
        {**_ADAFUSE50, **_TILES, "semantics": "paper"},
    ),
    "vit_small": ("vit", "VideoMAE, ViT-S: 16 frames as 1568 tokens; sta.r prunes them", {}),
    "vit_base": ("vit", "VideoMAE, ViT-B; sta.r prunes tokens", {"embed_dim": 768, "heads": 12}),
    "vit_large": (
        "vit",
        "VideoMAE, ViT-L; sta.r prunes tokens",
        {"depth": 24, "embed_dim": 1024, "heads": 16},
    ),
    "vit_huge": (
        "vit",
        "VideoMAE, ViT-H; sta.r prunes tokens",
        {"depth": 32, "embed_dim": 1280, "heads": 16},
    ),
    "video_swin_tiny": ("video_swin", "Video-Swin-T: 32 frames; sta.r prunes tokens, on a schedule of ours", {}),
    "video_swin_small": ("video_swin", "Video-Swin-S; sta.r prunes tokens", {"depths": (2, 2, 18, 2)}),
    "video_swin_base": ("video_swin", "Video-Swin-B; sta.r prunes tokens", _SWIN_BASE),
    "video_swin_base_ssv2": (
        "video_swin",
        "Video-Swin-B with windows of 16 frames, as for Something-Something V2",
        {**_SWIN_BASE, "window": (16, 7, 7), "classes": 174},
    ),
}


_PLANNED = {
    "arnet": "AR-Net",
    "vared2": "VA-RED2",
    "vared": "VA-RED2",
    "frameexit": "FrameExit",
    "dynconv": "DynConv",
    "dgnet": "DGNet",
    "cgnet": "CGNet",
    "x3d": "X3D",
    "i3d": "I3D",
}
"""Models that people will ask for, by their names without marks."""


def weights_folder() -> Path:
    """Return where the shipped weights lie."""
    return Path(__file__).parent / "weights"


def _shipped() -> dict[str, Path]:
    return {path.stem: path for path in sorted(weights_folder().glob("*.safetensors"))}


def names() -> list[str]:
    """Return the names of all models, the trained ones that ship first."""
    return [*_shipped(), *_ZOO]


def describe(name: str) -> ModelInfo:
    """Return what there is to say about a model; UsageError for an unknown name (needs no torch)."""
    if name in _ZOO:
        family, summary, defaults = _ZOO[name]
        options = dataclasses.asdict(FAMILIES[family].config(**defaults))
        return ModelInfo(name, summary, family, options, architecture=name)
    path = _shipped().get(name)
    if path is None:
        if (planned := _PLANNED.get(re.sub("[^a-z0-9]", "", name.lower()).removesuffix("resnet50"))) is not None:
            raise UsageError(
                f"{planned} is not in this release",
                hint="dvexport models lists what is; a model of your own is exported by a factory, "
                "see docs/adding-a-model.md",
            )
        raise unknown_name("model", name, names())
    about = read_metadata(path) or {}
    architecture = about.get("architecture", "")
    if architecture not in _ZOO:
        raise UsageError(f"'{name}' ships no known architecture", where=str(path), why=f"'{architecture}'")
    family = _ZOO[architecture][0]
    config = FAMILIES[family].config
    options = dataclasses.asdict(config(**parse_settings(config, about.get("settings", {}))))
    summary = f"trained {architecture}, {options['classes']} classes"
    return ModelInfo(name, summary, family, options, path, architecture, about.get("accuracy"), about.get("labels", []))


def parsed_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a model of `names()`, or of a saved directory, as values of their types; nothing is built.

    Raises:
        UsageError: an unknown name or option, or a value that does not fit.
    """
    family = _DIRECTORY_FAMILY if name == DIRECTORY else describe(name).family
    return parse_settings(FAMILIES[family].config, settings)


def weight_bytes(name: str, settings: Mapping[str, Any]) -> int:
    """Return the bytes of parameters and tables of a model of `names()`; no memory is taken for them.

    Raises:
        UsageError: an option that is unknown or unfit, or sizes that no model can have.
    """
    info = describe(name)
    parsed = parse_settings(FAMILIES[info.family].config, settings)
    return weight_bytes_of(name, lambda: _build(info, name, {**info.options, **parsed}))


def options(name: str) -> list[str]:
    """Return the names of a model's options, none for a factory of the user's (needs no torch)."""
    if name == DIRECTORY:
        return option_names(FAMILIES[_DIRECTORY_FAMILY].config)
    return list(describe(name).options) if name in names() else []


def create(
    name: str,
    checkpoint: str | Path | None = None,
    *,
    labels: str | Path | Sequence[str] | None = None,
    assume_defaults: bool = False,
    weights_key: str | None = None,
    description: Description | None = None,
    **settings: Any,
) -> VideoModel:
    """Make a model, in evaluation mode.

    A factory's module with a description is a `models.described.Described`, which has the same attributes.

    Args:
        name: a name of `names()`, `package.module:factory` for a model of your own, or a directory that
            Hugging Face's `save_pretrained` wrote (`dvexport.models.checkpoints.huggingface`).
        checkpoint: weights in any layout that `dvexport.models.checkpoints.importers` knows. Without them an
            architecture has random weights, a shipped model its own. What an import inferred and
            assumed is then in the model's `import_report`.
        labels: class names, or a text file with one a line.
        assume_defaults: where nothing tells an option that changes the numbers, take the official default
            instead of raising UntoldError (`dvexport.models.checkpoints.untold`).
        weights_key: where the weights stand in the checkpoint, such as `model_ema`, if it holds several.
        description: what a module that a factory returns does not tell of itself, if it is no `VideoModel`.
        settings: options as in `describe(name).options`; strings are parsed as in `--set key=value`.

    Raises:
        UsageError: for an unknown model, an unknown or unfit option, labels that don't fit.
        CheckpointError: for a checkpoint that is damaged, unsafe or of another model.
        UntoldError: for a checkpoint that leaves options open.
    """
    name, checkpoint = saved_directory(name, checkpoint)
    model: VideoModel
    if description is not None and ":" not in name:
        raise UsageError(f"'{name}' says itself what it takes and gives", hint="leave out its example and description")
    if weights_key is not None and (checkpoint is None or name == DIRECTORY):
        raise UsageError("a weights key is for a checkpoint's file", hint="leave it out, or give --checkpoint FILE")
    if name == DIRECTORY:
        model = _from_directory(checkpoint, settings, assume_defaults)
    elif ":" in name:
        from dvexport.models.described import described
        from dvexport.models.factory import model_of_factory

        model = described(model_of_factory(name, checkpoint, settings, weights_key), name, description)
    else:
        model = _from_zoo(describe(name), checkpoint, settings, assume_defaults, weights_key)
    if labels is not None:
        model.set_labels(_read_labels(labels) if isinstance(labels, (str, Path)) else list(labels))
    return model.eval()


def saved_directory(name: str, checkpoint: str | Path | None) -> tuple[str, str | Path | None]:
    """Return a directory given as a model as `DIRECTORY` with the directory as its checkpoint; others unchanged.

    Raises:
        UsageError: a directory together with a checkpoint, or a path where no directory is.
    """
    if name in names() or name == DIRECTORY:
        return name, checkpoint
    if Path(name).is_dir():
        if checkpoint is not None:
            raise UsageError("a directory holds its own weights", where=name, hint="leave out --checkpoint")
        return DIRECTORY, name
    if "/" in name and ":" not in name:
        raise UsageError("there is no such directory", where=name, hint="give what save_pretrained wrote")
    return name, checkpoint


def _from_directory(folder: str | Path | None, settings: Mapping[str, Any], assume_defaults: bool) -> VideoModel:
    from dvexport.models.checkpoints.huggingface import load_directory

    if folder is None:
        raise UsageError("a saved model needs its directory", hint="give the directory as the model")
    return load_directory(folder, settings, assume_defaults=assume_defaults)


def _read_labels(path: str | Path) -> list[str]:
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError("can't read the labels", where=str(path), why=why) from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _from_zoo(
    info: ModelInfo,
    checkpoint: str | Path | None,
    settings: Mapping[str, Any],
    assume_defaults: bool,
    weights_key: str | None,
) -> VideoModel:
    if info.weights is not None and checkpoint is not None:
        raise UsageError(
            f"'{info.name}' has weights of its own",
            hint=f"give --checkpoint to its architecture, {info.architecture}",
        )
    parsed = parse_settings(FAMILIES[info.family].config, settings)
    path = info.weights or checkpoint
    if path is not None:
        return _from_file(info, Path(path), parsed, assume_defaults, weights_key)
    if parsed:
        check_fits(info.name, lambda: _build(info, info.name, {**info.options, **parsed}))
    return _build(info, info.name, {**info.options, **parsed})


def _build(info: ModelInfo, name: str, options: Mapping[str, Any]) -> VideoModel:
    family = FAMILIES[info.family]
    return family.build(family.config(**parse_settings(family.config, options)), name)


def _from_file(
    info: ModelInfo, path: Path, settings: Mapping[str, Any], assume_defaults: bool, weights_key: str | None
) -> VideoModel:
    """Make a model and load its weights; what dvexport's own files say of input and labels holds."""
    from dvexport.models.checkpoints.importers import load_weights, plan_import

    how = {"assume_defaults": assume_defaults, "weights_key": weights_key}
    plan = plan_import(path, info.architecture, info.family, info.options, settings, **how)  # type: ignore[arg-type]
    model = _build(info, info.name, plan.options)
    load_weights(model, plan.state, where=str(path), names=plan.names)
    model.import_report = plan.report
    about = read_metadata(path) if plan.report.layout == "dvexport" else None
    if about:
        model.set_labels(about["labels"])
        model.preprocess = _trained_input(about["preprocess"], model.preprocess, settings)
    return model


def _trained_input(trained: Mapping[str, Any], built: Preprocess, settings: Mapping[str, Any]) -> Preprocess:
    """Return the preprocessing of the training, but for an input size or clip length given by name."""
    preprocess = Preprocess.from_dict(trained)
    if "size" in settings:
        preprocess = dataclasses.replace(preprocess, size=built.size, resize=built.resize)
    if "frames" in settings:
        preprocess = dataclasses.replace(preprocess, frames=built.frames)
    if settings.get("views", "one") != "one":
        names = ("resize", "sampling", "stride", "clips", "crops")
        preprocess = dataclasses.replace(preprocess, **{name: getattr(built, name) for name in names})
    return preprocess
