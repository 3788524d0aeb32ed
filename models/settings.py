"""Options given by name, as values of the types that a config declares (no torch: commands complete fast)."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

from dvexport.errors import UsageError, unknown_name

__all__ = ["OFFICIAL_NAMES", "option_names", "parse_settings"]

OFFICIAL_NAMES = {
    **dict.fromkeys(("num_segments", "num_frames", "clip_len", "num_frame"), "frames"),
    **dict.fromkeys(("num_class", "num_classes", "nb_classes", "num_labels"), "classes"),
    **dict.fromkeys(("input_size", "crop_size", "image_size", "img_size"), "size"),
    **dict.fromkeys(("r", "sta", "tokens"), "sta.r"),
    "gate_hidden_dim": "hidden",
    "gbn": "gate_bn",
    "grelu": "gate_relu",
    "gate_reduce_type": "gate_pool",
    "gate_history": "history",
    "shared_policy_net": "shared_policies",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "num_heads": "heads",
    "patch_size": "patch",
    "tubelet_size": "tubelet",
    "window_size": "window",
}
"""What official code and other libraries call options, by what they are called here."""

_SHIFTS = {"offline": "bidirectional", "official": "bidirectional", "TSM": "bidirectional"}
"""Other names of a shift: official training has this one, and calls it nothing."""


def option_names(config: type) -> list[str]:
    """Return the names of the options of a config class."""
    return [field.name for field in dataclasses.fields(config)]


def parse_settings(config: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` as values of the types that `config` declares.

    Args:
        config: one of the config classes.
        settings: values as in Python or JSON, or strings as in `--set key=value`.

    Raises:
        UsageError: for an unknown option (the nearest is suggested) or a value that does not fit.
    """
    types = typing.get_type_hints(config)
    known = option_names(config)
    parsed = {}
    for given, value in settings.items():
        name = given.replace(".", "_")  # sta.r is the field sta_r
        if name not in known:
            ours = OFFICIAL_NAMES.get(name)
            if ours is not None and ours.replace(".", "_") in known:
                raise UsageError(f"unknown option '{given}'", hint=f"it is called {ours} here: {ours}={value}")
            raise unknown_name("option", given, known)
        parsed[name] = _parse_value(name, value, types[name])
    return parsed


def _parse_value(name: str, value: Any, kind: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    try:
        if origin is Literal:
            return _parse_choice(name, value, arguments)
        if origin is tuple:
            return _parse_tuple(value, arguments)
        if kind is bool:
            return _parse_bool(value)
        if kind is int:
            return _parse_int(value)
        if type(None) in arguments:
            return None if value in (None, "none", "") else _parse_value(name, value, arguments[0])
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        wanted = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
        raise UsageError(f"option {name} can't be '{value}'", hint=f"give it as {wanted}") from None


def _parse_choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    by_text = {str(choice): choice for choice in choices}
    if name == "shift":
        value = _SHIFTS.get(str(value), value)
    if str(value) not in by_text:
        raise unknown_name(f"value of {name}", str(value), by_text)
    return by_text[str(value)]


def _parse_tuple(value: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = [part for part in value.replace("x", ",").split(",") if part.strip()]
    items = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    parsed = tuple(arguments[0](item) for item in items)
    if Ellipsis in arguments:
        return parsed
    if len(parsed) == 1:
        parsed *= len(arguments)
    if len(parsed) != len(arguments):
        raise ValueError(value)
    return parsed


def _parse_bool(value: Any) -> bool:
    words = {
        "true": True,
        "yes": True,
        "on": True,
        "1": True,
        "false": False,
        "no": False,
        "off": False,
        "0": False,
    }
    if str(value).lower() not in words:
        raise ValueError(value)
    return words[str(value).lower()]


def _parse_int(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(value)
    return int(value)
