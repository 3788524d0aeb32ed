"""What each option of a model means, as people ask for it: the config's docstring is where it is written."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dvexport.models import config as configs
from dvexport.models.checkpoints.untold import as_settings

__all__ = ["OptionHelp", "option_help"]

_ENTRY = re.compile(r"^ {8}(\w[\w, ]*): (.*(?:\n {9,}.*)*)", re.MULTILINE)
"""An entry of `Attributes:` in a docstring of this project: names, and a text that goes on further indented."""
_SEE = re.compile(r"see `(\w+)`\.?$")
_PARTS = {"StaSettings": "sta_"}
"""Classes of options that are a part of a config, and what their names begin with there."""


@dataclass(frozen=True)
class OptionHelp:
    """One option of a model.

    Attributes:
        name: as `--set` takes it.
        value: the model's own value, as `--set` takes it; empty: none.
        choices: all values there are; empty where it is a number or a list.
        text: what it means.
    """

    name: str
    value: str
    choices: tuple[str, ...]
    text: str


def option_help(config: type, values: Mapping[str, Any]) -> list[OptionHelp]:
    """Return what there is to say of each option of a config class.

    Args:
        config: one of `dvexport.models.config`.
        values: by name of the option.
    """
    texts, types = _texts(config), typing.get_type_hints(config)
    return [
        OptionHelp(_written(name), as_settings({name: value})[0].partition("=")[2], _choices(types[name]), texts[name])
        for name, value in values.items()
    ]


def _written(name: str) -> str:
    """Return an option's name as people write it: `sta.r` is the field `sta_r`."""
    prefix = next((prefix for prefix in _PARTS.values() if name.startswith(prefix)), "")
    return f"{prefix[:-1]}.{name.removeprefix(prefix)}" if prefix else name


def _choices(kind: Any) -> tuple[str, ...]:
    if kind is bool:
        return ("true", "false")
    return tuple(map(str, typing.get_args(kind))) if typing.get_origin(kind) is Literal else ()


def _texts(config: type) -> dict[str, str]:
    """Return the text of every option; an entry that refers to a class of options has that class's text."""
    found: dict[str, str] = {}
    for names, entry in _ENTRY.findall(config.__doc__ or ""):
        text, seen = " ".join(entry.split()), _SEE.search(entry)
        part = seen.group(1) if seen else ""
        for name in names.split(", "):
            found[name] = _texts(getattr(configs, part))[name.removeprefix(_PARTS[part])] if part in _PARTS else text
    return found
