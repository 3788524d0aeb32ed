"""Turns a checkpoint into a model: recognise the layout, infer the options, check, load.

Shapes tell depth, gated stages, history, actions, hidden sizes, sharing and classes. They don't tell
the number of frames, the shift of AdaFuse and D-STEP, or the input size: those come from
`--set frames=8 --set shift=...`, else from the official defaults, and are reported as assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dvexport.errors import CheckpointError, UsageError
from dvexport.models.checkpoint import Checkpoint, read_checkpoint
from dvexport.models.layouts import Layout, infer_mobilenet, infer_resnet, recognise
from dvexport.models.transformer_layouts import (
    infer_video_swin,
    infer_vit,
    recognise_transformer,
    swin_name,
    vit_name,
)

__all__ = ["ImportPlan", "ImportReport", "load_weights", "plan_import"]

_UNTOLD = {
    "resnet": ("frames", "shift", "shift_div", "size", "gate_relu", "semantics"),
    "mobilenet": ("frames", "shift", "shift_div", "size"),
    "vit": ("frames", "size"),
    "video_swin": ("frames", "size", "window"),
}
"""Options that no shape tells, by family."""
_IDENTITY = {
    "resnet": ("depth", "channel_gates", "tile_gates"),
    "vit": ("embed_dim", "depth"),
    "video_swin": ("embed_dim", "depths"),
}
"""Options that make one zoo model another, by family."""


@dataclass(frozen=True)
class ImportReport:
    """What an import found out, and what it had to assume.

    Attributes:
        path: the checkpoint.
        layout: name of the layout.
        inferred: options that the weights tell.
        assumed: options that nothing told, at the official defaults; set them by name to overrule.
    """

    path: str
    layout: str
    inferred: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the report for a person."""
        lines = [f"{self.path}: {self.layout} layout"]
        if self.inferred:
            lines.append("  inferred: " + _as_settings(self.inferred))
        if self.assumed:
            lines.append("  assumed:  " + _as_settings(self.assumed) + "  (overrule with --set)")
        return lines


def _as_settings(options: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={_plain(value)}" for key, value in options.items())


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class ImportPlan:
    """A checkpoint that fits a zoo model, before the model is built.

    Attributes:
        options: every option of the model, explicit ones first, then inferred, then defaults.
        state: the weights under dvexport's names.
        report: what was inferred and assumed.
    """

    options: dict[str, Any]
    state: dict[str, Tensor]
    report: ImportReport


def plan_import(
    path: str | Path, name: str, family: str, defaults: Mapping[str, Any], settings: Mapping[str, Any]
) -> ImportPlan:
    """Read a checkpoint for the zoo model `name` and settle every option.

    Args:
        path: the file.
        name, family, defaults: the zoo model, its family and its options.
        settings: options given by name, which outrank what is assumed.

    Raises:
        CheckpointError: if the file can't be read safely or is of another model.
        UsageError: if a setting contradicts the weights.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.metadata is not None:
        return _plan_own(checkpoint, name, settings)
    layout = _recognise(checkpoint.state, str(path))
    facts = _infer(layout, str(path))
    likely = likely_name(layout.family, facts)
    # A transformer's size may be given by name; a ResNet's is its zoo name.
    asked = {**defaults, **settings} if family in _TRANSFORMERS else defaults
    mismatch = _mismatch(family, asked, layout, facts)
    if mismatch:
        raise CheckpointError(
            f"the checkpoint is of another model than {name}",
            where=str(path),
            why=mismatch,
            hint=f"use {likely}, the most likely model" if likely else "give its size with --set, see the options",
        )
    if defaults.get("shift") == "online" and facts.get("shift") == "bidirectional":
        # The official layout marks a shifted convolution, not the direction of its shift.
        facts["shift"] = "online"
    for option, value in facts.items():
        if option in settings and settings[option] != value:
            raise UsageError(
                f"{option}={_plain(settings[option])} contradicts the checkpoint",
                where=str(path),
                why=f"its weights say {option}={_plain(value)}",
                hint=f"leave {option} out",
            )
    if family == "vit" and "heads" not in facts and "heads" not in settings:
        raise _unclear_heads(str(path), facts["embed_dim"])
    options = {**defaults, **facts, **settings}
    untold = [o for o in _UNTOLD[family] if o not in facts and o not in settings]
    report = ImportReport(str(path), layout.kind, facts, {option: options[option] for option in untold})
    return ImportPlan(options, layout.state, report)


def _unclear_heads(where: str, dim: int) -> CheckpointError:
    return CheckpointError(
        f"nothing in the checkpoint tells how many attention heads a width of {dim} has",
        where=where,
        why="official files of width 384 have 6 heads, converted ones 16: both load, one computes nonsense"
        if dim == 384
        else "the width is not one of VideoMAE's",
        hint="--set heads=6" if dim == 384 else "--set heads=...",
    )


def _plan_own(checkpoint: Checkpoint, name: str, settings: Mapping[str, Any]) -> ImportPlan:
    """Plan a checkpoint that `save_checkpoint` wrote: it says everything itself."""
    about = checkpoint.metadata
    assert about is not None
    if about.get("architecture") != name:
        raise CheckpointError(
            f"the checkpoint is of another model than {name}",
            where=str(checkpoint.path),
            why=f"it was saved as {about.get('architecture')}",
            hint=f"use {about.get('architecture')}",
        )
    report = ImportReport(str(checkpoint.path), "dvexport")
    return ImportPlan({**about.get("settings", {}), **settings}, checkpoint.state, report)


_INFER = {
    "resnet": infer_resnet,
    "mobilenet": infer_mobilenet,
    "vit": infer_vit,
    "video_swin": infer_video_swin,
}
_TRANSFORMERS = ("vit", "video_swin")


def _recognise(state: Mapping[str, Any], where: str) -> Layout:
    return recognise_transformer(state, where) or recognise(state, where)


def _infer(layout: Layout, where: str) -> dict[str, Any]:
    return _INFER[layout.family](layout, where)


def likely_name(family: str, facts: Mapping[str, Any]) -> str | None:
    """Return the zoo name of the model that inferred options describe, None if there is none."""
    if family in _TRANSFORMERS:
        return vit_name(facts) if family == "vit" else swin_name(facts)
    if family == "mobilenet":
        return "tsm_mobilenetv2" if facts.get("shift") == "bidirectional" else "tsm_online_mobilenetv2"
    suffix = f"resnet{facts['depth']}"
    if facts["tile_gates"]:
        return f"dstep_{suffix}"
    if facts["channel_gates"]:
        last_only = facts["depth"] == 50 and facts.get("enabled_stages") == (3,)
        return f"adafuse_{suffix}_last" if last_only else f"adafuse_{suffix}"
    return f"tsm_{suffix}" if facts.get("shift") == "bidirectional" else f"tsn_{suffix}"


def _mismatch(family: str, defaults: Mapping[str, Any], layout: Layout, facts: Mapping[str, Any]) -> str:
    """Return in what the checkpoint is another model than the one with `defaults`, empty if in nothing."""
    if layout.family != family:
        return f"its layers are those of a {layout.family}"
    differing = [o for o in _IDENTITY.get(family, ()) if o in facts and facts[o] != defaults[o]]
    if family == "resnet" and "shift" in facts and _shifts(facts) != _shifts(defaults):
        differing.append("shift")
    return "its weights say " + _as_settings({o: facts[o] for o in differing}) if differing else ""


def _shifts(options: Mapping[str, Any]) -> bool:
    return options["shift"] != "none"


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Put `state` into `model`, every key of it.

    Layers that blocks share may stand under the first block only.

    Raises:
        CheckpointError: if keys are missing or left over, or shapes differ; the first few are named.
    """
    own: dict[str, Tensor] = model.state_dict(keep_vars=True)
    known_at: dict[int, str] = {}
    complete = {}
    for key, value in own.items():
        first = known_at.setdefault(id(value), key)
        source = key if key in state else first
        if source in state:
            complete[key] = state[source]
        elif key.endswith("num_batches_tracked"):
            complete[key] = value
    problems = [
        ("missing", [key for key in own if key not in complete]),
        ("unexpected", [key for key in state if key not in own]),
        (
            "of another shape",
            [
                f"{key} {tuple(complete[key].shape)} instead of {tuple(own[key].shape)}"
                for key in own
                if key in complete and complete[key].shape != own[key].shape
            ],
        ),
    ]
    found = [f"{len(keys)} {kind}: {', '.join(keys[:3])}" for kind, keys in problems if keys]
    if found:
        raise CheckpointError(
            "the checkpoint's keys don't fit the model", where=where, why="; ".join(found), hint=_hint(state)
        )
    model.load_state_dict(complete)


def _hint(state: Mapping[str, Tensor]) -> str | None:
    """Return which zoo model the keys belong to, None if they tell nothing."""
    try:
        layout = _recognise(state, "")
        likely = likely_name(layout.family, _infer(layout, ""))
        return f"the most likely model is {likely}" if likely else None
    except CheckpointError:
        return None
