"""What nothing in a checkpoint tells: which options are asked for, and how.

One rule for every option of every family (`Family.roles`), so that no file is read as another model without a word:

- `inferred`: keys, shapes or tables of the weights tell it. A setting that says otherwise is refused.
- `named`: the zoo has a name for each choice, so the name that was asked for tells it.
- `asked`: nothing tells it, and other values give other numbers. An import without it is refused, with the
  choices, unless it is set by name or `assume_defaults` is given; what was assumed then is reported and kept.
- `fixed`: the official code has no option for it. It is what that code has, unless set by name.
- `chosen`: no property of the weights; what to make of them, such as how many tokens to prune.
- `training`: without effect on what the weights compute.

An option may be asked for with one layout and inferred with another: the role says what holds where nothing tells.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dvexport.errors import UntoldError
from dvexport.models.checkpoints.families import FAMILIES

__all__ = ["Question", "as_settings", "has_effect", "questions", "refusal"]


@dataclass(frozen=True)
class Question:
    """An option that nothing tells.

    Attributes:
        option: its name.
        asks: what it is, with the official code's name for it.
        choices: (value, what it means), a value in capitals standing for any of its kind.
        default: what `assume_defaults` takes.
    """

    option: str
    asks: str
    choices: tuple[tuple[str, str], ...]
    default: Any


_SIZE = ("height and width that frames are cropped to, in pixels", ("S or HxW", "the crop of the training"))
_TEXTS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "shift": (
        "temporal shift (--shift)",
        (
            ("none", "no shift: the model was trained without --shift"),
            (
                "bidirectional",
                "--shift: channels from the frames after and before (set shift_div); clip mode only",
            ),
            ("online", "channels from the frame before only (set shift_div), as no official training does it"),
        ),
    ),
    "shift_div": (
        "share of the channels that a shift moves in each direction (--shift_div)",
        (("N", "one in N; official models have 8"),),
    ),
    "shift_place": (
        "what a shift moves",
        (
            ("conv1", "the input of each block's first convolution (TSM, --shift_place=blockres)"),
            ("block", "what the branch, the policy and the downsampling read, not the identity (AdaFuse, D-STEP)"),
            ("in_place", "a block's whole input, the identity too (TSM, --shift_place=block)"),
        ),
    ),
    "gate_relu": (
        "ReLU between the layers of a policy (--grelu)",
        (("true", "with --grelu, as in every published command"), ("false", "without")),
    ),
    "gate_pool": (
        "what a policy sees of a channel (--gate_reduce_type)",
        (("mean", "its mean over the plane, avg there, as in every published command"), ("max", "its maximum")),
    ),
    "frames": ("frames of a clip (--num_segments)", (("N", "as many as in training, in most models 8 or 16"),)),
    "size": (_SIZE[0], (_SIZE[1],)),
    "window": (
        "tokens of a window in time, height and width",
        (("8,7,7", "in most models"), ("16,7,7", "Video-Swin-B on Something-Something V2")),
    ),
    "heads": ("attention heads", (("N", "must divide the width"),)),
}
_TRANSFORMER_FRAMES = ("frames of a clip (--num_frames, clip_len)", (("N", "as many as in training"),))
_HEADS_384 = ("attention heads", (("6", "official ViT-S"), ("16", "ViT-S as converted for Hugging Face's library")))


def questions(
    family: str, options: Mapping[str, Any], told: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[Question]:
    """Return the questions that an import has to ask, in the order of the family's roles.

    Args:
        family: the family that the model belongs to.
        options: every option, at its default where nothing tells it.
        told: what the weights and the model's name tell.
        settings: what was given by name.
    """
    asked = [option for option, role in FAMILIES[family].roles.items() if role == "asked"]
    open_ones = [o for o in asked if o not in told and o not in settings and has_effect(family, o, options)]
    return [Question(option, *_text(family, option, options), options[option]) for option in open_ones]


def has_effect(family: str, option: str, options: Mapping[str, Any]) -> bool:
    """Return whether another value of `option` gives other numbers."""
    if FAMILIES[family].roles[option] == "training":
        return False
    if option in ("shift_div", "shift_place"):
        return bool(options["shift"] != "none")
    return option not in _OF_POLICIES or bool(options["channel_gates"])


_OF_POLICIES = frozenset(
    ("history", "skipping", "hidden", "hidden_quota", "gate_bn", "gate_relu", "gate_pool", "shared_policies")
)
"""Options without effect where there are no policies."""


def _text(family: str, option: str, options: Mapping[str, Any]) -> tuple[str, tuple[tuple[str, str], ...]]:
    if option == "heads" and options["embed_dim"] == 384:
        return _HEADS_384
    if option == "frames" and FAMILIES[family].transformer:
        return _TRANSFORMER_FRAMES
    return _TEXTS[option]


def as_settings(options: Mapping[str, Any]) -> list[str]:
    """Return options as `--set` takes them, `KEY=VALUE` each."""
    return [f"{key}={_plain(key, value)}" for key, value in options.items()]


def _plain(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ("x" if key == "size" else ",").join(map(str, value))
    return str(value)


def refusal(asked: list[Question], where: str) -> UntoldError:
    """Return the error that asks: each option, its choices and what they mean, and what to add to the command."""
    lines: list[str] = []
    for question in asked:
        lines.append(f"{question.option}: {question.asks}")
        width = max(len(value) for value, _ in question.choices)
        lines += [f"    {value:{width}}  {meaning}" for value, meaning in question.choices]
    defaults = as_settings({question.option: question.default for question in asked})
    settings = shlex.join(word for pair in defaults for word in ("--set", pair))
    names = ", ".join(question.option for question in asked)
    return UntoldError(
        f"nothing in the checkpoint tells {names}, and the numbers depend on {'them' if len(asked) > 1 else 'it'}",
        where=where,
        why="other values are other models:\n    " + "\n    ".join(lines),
        hint=f"{settings}  (official defaults: change what differs), or --assume-defaults (assume_defaults=True)",
        settings=defaults,
    )
