"""Turns a checkpoint into a model: recognise the layout, infer the options, ask for the others, check, load.

Keys and shapes tell depth, gated stages, history, actions, hidden sizes, sharing and classes, and whether and
where TSM shifts. They don't tell the number of frames, the input size, or the shift of AdaFuse and D-STEP: those
are asked for. `dvexport.models.checkpoints.untold` has the rule for every option.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dvexport.errors import CheckpointError, UsageError
from dvexport.models.checkpoints.checkpoint import Checkpoint, read_checkpoint
from dvexport.models.checkpoints.families import FAMILIES, layout_of
from dvexport.models.checkpoints.layouts import Layout
from dvexport.models.checkpoints.untold import as_settings, has_effect, questions, refusal
from dvexport.models.config import ViTConfig
from dvexport.models.settings import parse_settings

__all__ = ["ImportPlan", "ImportReport", "contradiction", "load_weights", "plan_import"]

_FREE = ("frames", "size")
"""Asked of a foreign file; of one that tells them, the same weights may be run with others."""


@dataclass(frozen=True)
class ImportReport:
    """What an import found out, and what it had to assume.

    Attributes:
        path: the checkpoint.
        layout: name of the layout.
        inferred: options that the weights tell, and that the name of the model tells.
        given: options set by name that the weights do not tell.
        assumed: options that nothing told, at the official defaults; set them by name to overrule.
        notes: how the weights were found in the file, and what an assumption means; a sentence each.
    """

    path: str
    layout: str
    inferred: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the report for a person."""
        lines = [f"{self.path}: {self.layout} layout"]
        if self.inferred:
            lines.append("  inferred: " + _joined(self.inferred))
        if self.given:
            lines.append("  given:    " + _joined(self.given))
        if self.assumed:
            lines.append("  assumed:  " + _joined(self.assumed) + "  (overrule with --set)")
        return lines + [f"  note:     {note}" for note in self.notes]


def _joined(options: Mapping[str, Any]) -> str:
    return " ".join(as_settings(options))


@dataclass(frozen=True)
class ImportPlan:
    """A checkpoint that fits a zoo model, before the model is built.

    Attributes:
        options: every option of the model, explicit ones first, then inferred, then defaults.
        state: the weights under dvexport's names.
        report: what was inferred and assumed.
        names: what the file calls them, by dvexport's name.
    """

    options: dict[str, Any]
    state: dict[str, Tensor]
    report: ImportReport
    names: Mapping[str, str] = field(default_factory=dict)


_DIRECTION = (
    "these weights are of a shifted model, and don't tell the direction; official training shifts both ways "
    "(shift=bidirectional, clip mode), and with weights of that kind the logits of shift=online are others"
)


def plan_import(
    path: str | Path,
    name: str,
    family: str,
    defaults: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    assume_defaults: bool = False,
    weights_key: str | None = None,
) -> ImportPlan:
    """Read a checkpoint for the zoo model `name` and settle every option.

    Args:
        path: the file.
        name, family, defaults: the zoo model, its family and its options.
        settings: options given by name, which outrank what is assumed.
        assume_defaults: take the defaults of what nothing tells instead of asking.
        weights_key: where the weights stand in the file, see `read_checkpoint`.

    Raises:
        UntoldError: if nothing tells an option that changes the numbers.
        CheckpointError: if the file can't be read safely or is of another model.
        UsageError: if a setting contradicts the weights.
    """
    checkpoint = read_checkpoint(path, weights_key)
    if checkpoint.metadata is not None:
        return _plan_own(checkpoint, name, family, settings)
    layout = layout_of(checkpoint.state, str(path))
    facts = FAMILIES[layout.family].infer(layout, str(path))
    # A transformer's size and the direction of a shift may be given by name; a ResNet's depth is its zoo name.
    free = settings if FAMILIES[family].transformer else {k: v for k, v in settings.items() if k == "shift"}
    mismatch = _mismatch(family, {**defaults, **free}, layout, facts)
    if mismatch:
        raise CheckpointError(
            f"the checkpoint is of another model than {name}",
            where=str(path),
            why=mismatch,
            hint=_other_model(layout.family, facts),
        )
    told = {**_named(defaults), **facts}
    assumed, notes = {}, checkpoint.found.lines()
    if facts.get("shift") == "bidirectional":
        # The official layout marks that a block is shifted, not the direction: that is for the name to say.
        told["shift"] = facts["shift"] = settings.get("shift", defaults["shift"])
        if facts["shift"] == "online" and "shift" not in settings:
            assumed["shift"] = told.pop("shift")
            notes.append(_DIRECTION)
    for option, value in facts.items():
        if option in settings and settings[option] != value:
            raise contradiction({option: settings[option]}, {option: value}, "checkpoint", str(path), "its weights say")
    options = {**defaults, **told, **settings}
    asked = questions(family, options, {**told, **assumed}, settings)
    if asked and not assume_defaults:
        raise refusal(asked, f"{path} ({layout.kind} layout)")
    _check_tokens(layout, options, str(path))
    given = {option: value for option, value in settings.items() if option not in facts}
    inferred = {o: value for o, value in told.items() if o not in given and has_effect(family, o, options)}
    assumed |= {question.option: question.default for question in asked}
    report = ImportReport(str(path), layout.kind, inferred, given, assumed, tuple(notes))
    return ImportPlan(options, layout.state, report, _names(checkpoint, layout.state))


def _names(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what the file calls each weight, by dvexport's name; tensors are the same objects in both."""
    known = {id(value): checkpoint.found.prefix + key for key, value in checkpoint.state.items()}
    return {own: known[id(value)] for own, value in state.items() if id(value) in known}


def _named(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that the zoo has names for: the shift of models without gates, D-STEP's two versions."""
    named = {}
    if "shift" in defaults and not defaults.get("channel_gates"):
        named["shift"] = defaults["shift"]
    if defaults.get("tile_gates"):
        named["semantics"] = defaults["semantics"]
    return named


def contradiction(given: Mapping[str, Any], found: Mapping[str, Any], source: str, where: str, says: str) -> UsageError:
    """Return the error for a setting that a file contradicts; `says` begins the reason, such as `its config says`."""
    return UsageError(
        f"{_joined(given)} contradicts the {source}",
        where=where,
        why=f"{says} {_joined(found)}",
        hint=f"leave {' and '.join(given)} out",
    )


def _check_tokens(layout: Layout, options: Mapping[str, Any], where: str) -> None:
    """Raise UsageError if a stored table of positions is that of another number of tokens."""
    if layout.positions is None:
        return
    config, tokens = ViTConfig(**options), layout.positions.shape[1]
    if config.tokens != tokens:
        raise UsageError(
            f"{_joined({'frames': config.frames, 'size': config.size})} contradict the checkpoint",
            where=f"{where}: pos_embed",
            why=f"it has positions for {tokens} tokens, and these are {config.tokens}",
            hint="set frames and size as they were in training",
        )


def _other_model(family: str, facts: Mapping[str, Any]) -> str:
    likely = FAMILIES[family].likely(facts)
    if likely:
        return f"use {likely}, the most likely model"
    if family == "mobilenet":
        return "--set shift=none"
    sizes = {option: facts[option] for option in FAMILIES[family].identity if option in facts}
    return "give its sizes: " + " ".join(f"--set {pair}" for pair in as_settings(sizes))


def _plan_own(checkpoint: Checkpoint, name: str, family: str, settings: Mapping[str, Any]) -> ImportPlan:
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
    known = parse_settings(FAMILIES[family].config, about.get("settings", {}))
    for option, value in settings.items():
        free = option in _FREE or FAMILIES[family].roles[option] in ("chosen", "training")
        if not free and known.get(option, value) != value:
            said = {option: known[option]}
            raise contradiction({option: value}, said, "checkpoint", str(checkpoint.path), "it was trained with")
    report = ImportReport(str(checkpoint.path), "dvexport")
    return ImportPlan({**known, **settings}, checkpoint.state, report)


def _mismatch(family: str, defaults: Mapping[str, Any], layout: Layout, facts: Mapping[str, Any]) -> str:
    """Return in what the checkpoint is another model than the one with `defaults`, empty if in nothing."""
    if layout.family != family:
        return f"its layers are those of a {layout.family}"
    differing = [o for o in FAMILIES[family].identity if o in facts and facts[o] != defaults[o]]
    said = ["its weights say " + _joined({o: facts[o] for o in differing})] if differing else []
    if "shift" in facts and _shifts(facts) != _shifts(defaults):
        said.append("its blocks are shifted" if _shifts(facts) else "its blocks are not shifted")
    return ", and ".join(said)


def _shifts(options: Mapping[str, Any]) -> bool:
    return options["shift"] != "none"


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], *, where: str, names: Mapping[str, str] | None = None
) -> None:
    """Put `state` into `model`, every key of it.

    Layers that blocks share may stand under the first block only.

    Args:
        names: what the file calls weights, by the model's name, for messages.

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
    present = [key for key in own if key in complete]
    problems = [
        ("missing", [key for key in own if key not in complete]),
        ("unexpected", [key for key in state if key not in own]),
        (
            "of another shape",
            [
                f"{key} {tuple(complete[key].shape)} instead of {tuple(own[key].shape)}"
                for key in present
                if complete[key].shape != own[key].shape
            ],
        ),
        (
            "of another type",
            [
                f"{key} {complete[key].dtype} instead of {own[key].dtype}"
                for key in present
                if complete[key].is_floating_point() != own[key].is_floating_point()
            ],
        ),
    ]
    found = [
        f"{len(keys)} {kind}: {', '.join(_in_file(key, names or {}) for key in keys[:3])}"
        for kind, keys in problems
        if keys
    ]
    if found:
        raise CheckpointError(
            "the checkpoint's keys don't fit the model", where=where, why="; ".join(found), hint=_hint(state)
        )
    model.load_state_dict(complete)


def _alike(first: str, second: str) -> int:
    """Return how many characters two names begin with alike."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _in_file(key: str, names: Mapping[str, str]) -> str:
    """Return what the file calls a weight, or would: as it calls the one whose name is most alike."""
    own, rest = key.partition(" ")[0], key.partition(" ")[1] + key.partition(" ")[2]
    if own in names:
        return names[own] + rest
    alike = max(names, key=lambda name: _alike(name, own), default=None)
    if alike is None:
        return key
    stored = names[alike]
    same = _alike(alike[::-1], stored[::-1])
    before, ours = stored[: len(stored) - same], alike[: len(alike) - same]
    return before + own[len(ours) :] + rest if own.startswith(ours) else key


def _hint(state: Mapping[str, Tensor]) -> str | None:
    """Return which zoo model the keys belong to, None if they tell nothing."""
    try:
        layout = layout_of(state, "")
        family = FAMILIES[layout.family]
        likely = family.likely(family.infer(layout, ""))
        return f"the most likely model is {likely}" if likely else None
    except CheckpointError:
        return None
