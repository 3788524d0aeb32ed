"""What a checkpoint holds, without a model in mind: layout, likely model, what it tells and what it leaves open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dvexport.errors import CheckpointError
from dvexport.models.checkpoints.checkpoint import Checkpoint, read_checkpoint
from dvexport.models.checkpoints.families import FAMILIES, layout_of
from dvexport.models.checkpoints.untold import as_settings, questions

__all__ = ["Contents", "contents_of"]


@dataclass(frozen=True)
class Contents:
    """What there is in a checkpoint.

    Attributes:
        path: the file or directory.
        layout: what its names are; empty if they are of no known model.
        model: name of the most likely model to export, empty if there is none.
        tensors, parameters: how many weights, and numbers in them.
        weights: how they were found, a sentence each.
        told: options that it tells, as `--set` takes them.
        untold: options that it leaves open: what each is.
        others: what else the file holds, by key.
        names: the first names of weights, where the layout is not known.
        why: why no model fits.
    """

    path: str
    layout: str
    model: str
    tensors: int
    parameters: int
    weights: list[str]
    told: list[str] = field(default_factory=list)
    untold: dict[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def contents_of(path: str | Path, weights_key: str | None = None) -> Contents:
    """Return what a file of weights, or a directory of Hugging Face's library, holds.

    Raises:
        CheckpointError: it can't be read, or holds no weights.
        UsageError: nothing stands under `weights_key`.
    """
    if Path(path).is_dir():
        return _directory(Path(path))
    checkpoint = read_checkpoint(path, weights_key)
    count = sum(value.numel() for value in checkpoint.state.values())
    size = len(checkpoint.state), count, checkpoint.found.lines()
    if checkpoint.metadata is not None:
        name = str(checkpoint.metadata.get("architecture", ""))
        told = as_settings(checkpoint.metadata.get("settings", {}))
        return Contents(str(path), "dvexport", name, *size, told)
    try:
        return _foreign(checkpoint, size)
    except CheckpointError as error:
        names = list(checkpoint.state)[:5]
        why = f"{error.what}{f': {error.why}' if error.why else ''}"
        return Contents(str(path), "", "", *size, others=checkpoint.found.others, names=names, why=why)


def _foreign(checkpoint: Checkpoint, size: tuple[int, int, list[str]]) -> Contents:
    path = str(checkpoint.path)
    layout = layout_of(checkpoint.state, path)
    family = FAMILIES[layout.family]
    facts = family.infer(layout, path)
    options = {**asdict(family.config()), **facts}
    told = {option: value for option, value in facts.items() if option != "shift" or value == "none"}
    asked = questions(layout.family, options, told, {})
    return Contents(
        path,
        layout.kind,
        family.likely(facts) or "",
        *size,
        as_settings(told),
        {question.option: question.asks for question in asked},
        checkpoint.found.others,
        why="" if family.likely(facts) else "no model of the zoo has these sizes",
    )


def _directory(folder: Path) -> Contents:
    from dvexport.models.checkpoints.huggingface import load_directory

    model = load_directory(folder, {}, assume_defaults=True)
    report, values = model.import_report, list(model.state_dict().values())
    count = sum(value.numel() for value in values)
    untold = dict.fromkeys(report.assumed, "how frames are normalised (preprocessor_config.json)")
    return Contents(
        str(folder), report.layout, str(folder), len(values), count, [], as_settings(report.inferred), untold
    )
