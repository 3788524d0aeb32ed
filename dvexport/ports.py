"""What a model takes and gives, by name: the inputs of one frame, and the outputs with what they mean.

A module says what it takes by `input_shapes` and what it gives by `declared_outputs`, as `VideoModel` does. One
without them takes `frames` and gives `logits`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dvexport.errors import TraceError, UsageError, unknown_name

__all__ = [
    "KINDS", "LOGITS", "VIDEO", "Output", "OutputKind", "check_names", "input_shapes", "named_outputs", "outputs_of",
]  # fmt: skip

VIDEO, LOGITS = "frames", "logits"
"""The input and the output of a classifier; a video is the first input of any model."""

OutputKind = Literal["array", "logits", "map", "boxes", "scores"]
KINDS: tuple[str, ...] = get_args(OutputKind)

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_RESERVED = re.compile(r"forced_.*")
"""Names that the golden data of a bundle uses for itself; those with a dot are no names of ports."""
_RANKS = {"logits": 2, "map": 4, "boxes": 3, "scores": 3}


@dataclass(frozen=True)
class Output:
    """An output of a model.

    Attributes:
        name: the output's name.
        kind: what it holds for each of N frames: `logits` `[N, classes]`; `map` `[N, channels, H, W]`, a score of each
            class at each place, or one channel whose sign tells; `boxes` `[N, K, 4]`, left, top, right and bottom in
            pixels of the model's frames; `scores` `[N, K, classes]` of boxes; `array`: anything else.
        labels: names of the classes of logits, a map or scores; none where there are none.
    """

    name: str
    kind: OutputKind = "array"
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("kind of output", self.kind, KINDS)
        object.__setattr__(self, "labels", tuple(self.labels))
        if self.labels and self.kind in ("array", "boxes"):
            raise UsageError(f"an output of kind '{self.kind}' has no labels", where=self.name)

    def check(self, shape: Sequence[int]) -> None:
        """Check that an output of `shape`, frames first, is what it is declared as.

        Raises:
            UsageError: another number of axes, boxes of other than four numbers, labels of another number.
        """
        rank = _RANKS.get(self.kind, len(shape))
        if len(shape) != rank or (self.kind == "boxes" and shape[-1] != 4):
            wanted = {"map": "[frames, channels, height, width]", "boxes": "[frames, boxes, 4]"}
            sizes = wanted.get(self.kind, f"{rank} axes, frames first")
            raise UsageError(f"an output of kind '{self.kind}' is {sizes}", where=self.name, why=f"it is {list(shape)}")
        classes = shape[1] if self.kind == "map" else shape[-1]
        if self.labels and len(self.labels) != (2 if (self.kind, classes) == ("map", 1) else classes):
            what = {"map": "channels", "logits": "classes", "scores": "classes"}[self.kind]
            raise UsageError(f"{len(self.labels)} labels for an output of {classes} {what}", where=self.name)


def input_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of one frame of every input of a model, in the order in which its forward takes them."""
    told = getattr(model, "input_shapes", None)
    return {VIDEO: (3, *model.preprocess.size)} if told is None else dict(told)


def outputs_of(model: Any) -> tuple[Output, ...]:
    """Return the outputs of a model, in the order in which its forward gives them."""
    told = getattr(model, "declared_outputs", None)
    return (Output(LOGITS, "logits", tuple(getattr(model, "labels", ()))),) if told is None else tuple(told)


def named_outputs(result: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return by name what a model's forward gave.

    Args:
        result: a tensor, a tuple or list of them, a NamedTuple or a dict.
        names: for what has no names of its own, in order.

    Raises:
        TraceError: as many names are not told as there are results, or results lie inside results.
    """
    if isinstance(result, Mapping):
        found = dict(result)
    elif hasattr(result, "_asdict"):
        found = result._asdict()
    else:
        parts = list(result) if isinstance(result, tuple | list) else [result]
        if len(parts) != len(names):
            raise TraceError(
                f"the model gives {len(parts)} outputs, and {len(names)} are named",
                why="a tuple has no names of its own",
                hint="return a dict or a NamedTuple, or name them in order: outputs=['boxes', 'scores']",
            )
        found = dict(zip(names, parts, strict=True))
    for name, value in found.items():
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise TraceError("an output is no tensor", where=str(name), why=f"it is a {type(value).__name__}")
    return found


def check_names(inputs: Iterable[str], outputs: Iterable[str]) -> None:
    """Raise UsageError for names of ports that are none, reserved, or given twice."""
    seen: set[str] = set()
    for name in [*inputs, *outputs]:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} is no name of an input or output", why="it is letters, digits and _")
        if _RESERVED.fullmatch(name):
            raise UsageError(f"'{name}' can't name an input or output", why="bundles keep forced_... for themselves")
        if name in seen:
            raise UsageError(f"two inputs or outputs are called '{name}'", hint="give each a name of its own")
        seen.add(name)
