"""Options of the model families, as plain data (no torch: the zoo lists them at once)."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dvexport.errors import UsageError, unknown_name
from dvexport.preprocess import Preprocess

__all__ = [
    "MobileNetConfig",
    "Preprocess",
    "ResNetConfig",
    "Shift",
    "option_names",
    "parse_settings",
]

Shift = Literal["none", "bidirectional", "online"]
"""TSM: `bidirectional` reads frames t+1 and t-1, `online` only t-1 (other weights, other channels)."""


@dataclass(frozen=True)
class ResNetConfig:
    """Every option of the ResNet family: TSN, TSM, AdaFuse, D-STEP.

    Attributes:
        depth: 18 or 50.
        width: multiplier of every channel count (1.0 is the published model).
        classes: number of labels.
        frames: frames in a clip.
        size: height and width of the input.
        shift: temporal shift, see `Shift`.
        shift_div: the shift moves 1/`shift_div` of the channels in each direction.
        shift_place: `conv1` shifts the input of conv1 only (official TSM); `block` shifts what conv1,
            policy and downsample see, not the identity skip (`--shift` of AdaFuse and D-STEP).
        channel_gates: AdaFuse's channel policy.
        tile_gates: D-STEP's tile mask.
        enabled_stages: stages with gates, 0-based (`--enabled_stages`).
        history: the policy sees the previous frame and may reuse it (`--gate_history`).
        skipping: the policy may skip where it may reuse (False is `--gate_no_skipping`).
        hidden: hidden units of a policy net (`--gate_hidden_dim`).
        hidden_quota: if above 0, hidden units are `hidden_quota // channels` (`--hidden_quota`).
        gate_bn: batch norm between the policy's linear layers (`--gbn`).
        gate_relu: ReLU between them (`--grelu`).
        shared_policies: blocks of equal shape share the linear layers (`--shared_policy_net`).
        semantics: D-STEP as its `code` (the policy sees x, and training leaves conv1's output unmasked)
            or its `paper` (the policy sees x under the tile mask, which applies in training too).
        sampling: `argmax` decides deterministically; `official` draws from Gumbel-softmax in evaluation
            too, as the published numbers were made.
        tau: temperature of the Gumbel relaxations, in training.
        dropout: before the classifier, in training.
    """

    depth: Literal[18, 50] = 18
    width: float = 1.0
    classes: int = 174
    frames: int = 8
    size: tuple[int, int] = (224, 224)
    shift: Shift = "none"
    shift_div: int = 8
    shift_place: Literal["conv1", "block"] = "conv1"
    channel_gates: bool = False
    tile_gates: bool = False
    enabled_stages: tuple[int, ...] = (0, 1, 2, 3)
    history: bool = True
    skipping: bool = True
    hidden: int = 1024
    hidden_quota: int = 0
    gate_bn: bool = True
    gate_relu: bool = True
    shared_policies: bool = False
    semantics: Literal["code", "paper"] = "code"
    sampling: Literal["argmax", "official"] = "argmax"
    tau: float = 0.67
    dropout: float = 0.5

    def __post_init__(self) -> None:
        _check_common(self.classes, self.frames, self.size, self.shift_div, self.width)
        if not set(self.enabled_stages) <= {0, 1, 2, 3}:
            raise UsageError(f"enabled_stages={self.enabled_stages} names a stage that ResNet has not",
                             hint="stages are 0, 1, 2, 3")  # fmt: skip
        if self.hidden < 1 or self.hidden_quota < 0:
            raise UsageError(f"a policy net needs hidden units, not {self.hidden}", hint="hidden=1024")

    @property
    def actions(self) -> tuple[int, ...]:
        """The actions (0 skip, 1 reuse, 2 compute) in the order of the policy's outputs."""
        if not self.history:
            return (0, 2)
        return (0, 1, 2) if self.skipping else (1, 2)

    @property
    def causal(self) -> bool:
        """Whether no frame depends on a later one."""
        return self.shift != "bidirectional"

    def policy_hidden(self, channels: int) -> int:
        """Return the hidden units of the policy of a gate with `channels` channels."""
        return self.hidden_quota // channels if self.hidden_quota else self.hidden


@dataclass(frozen=True)
class MobileNetConfig:
    """Options of MobileNetV2 as TSM.

    Attributes:
        width: multiplier of the channel counts (the stem stays at 32).
        classes: number of labels.
        frames: frames in a clip.
        size: height and width of the input.
        shift: temporal shift, see `Shift`.
        shift_div: the shift moves 1/`shift_div` of the channels in each direction.
        dropout: before the classifier, in training.
    """

    width: float = 1.0
    classes: int = 27
    frames: int = 8
    size: tuple[int, int] = (224, 224)
    shift: Shift = "none"
    shift_div: int = 8
    dropout: float = 0.5

    def __post_init__(self) -> None:
        _check_common(self.classes, self.frames, self.size, self.shift_div, self.width)

    @property
    def causal(self) -> bool:
        """Whether no frame depends on a later one."""
        return self.shift != "bidirectional"


def _check_common(classes: int, frames: int, size: tuple[int, ...], shift_div: int, width: float) -> None:
    for name, value in (("classes", classes), ("frames", frames)):
        if value < 1:
            raise UsageError(f"{name}={value} is not a positive number")
    if len(size) != 2 or min(size) < 1:
        raise UsageError(f"size={size} is not a height and a width", hint="size=224 or size=224x160")
    if shift_div < 2:
        raise UsageError(f"shift_div={shift_div} leaves no channel unshifted", hint="shift_div=8")
    if width <= 0:
        raise UsageError(f"width={width} is not a positive multiplier", hint="width=1.0")


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
    for name, value in settings.items():
        if name not in known:
            raise unknown_name("option", name, known)
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
    except (TypeError, ValueError):
        wanted = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
        raise UsageError(f"option {name} can't be '{value}'", hint=f"give it as {wanted}") from None


def _parse_choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    by_text = {str(choice): choice for choice in choices}
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
