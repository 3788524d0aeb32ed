"""Options of `dvexport export` that say what a module of one's own does not tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from dvexport.cli.options import parse_pairs
from dvexport.errors import UsageError

if TYPE_CHECKING:
    from dvexport.models.described import Description
    from dvexport.video.preprocess import Preprocess

__all__ = ["description_of", "description_options"]

_IMAGENET = "imagenet"
_KIND_HINT = "name the output: --kind masks=map; a result that comes alone and without a name is called output"
_LISTS = {"mean": float, "std": float}
_NUMBERS: dict[str, Callable[[str], Any]] = {"resize": int, "frames": int, "frame_rate": float}


def description_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command."""
    for option in reversed((
        click.option("--input", "shapes", multiple=True, metavar="NAME=SIZES",
                     help="One frame of an input of your own module, such as frames=3x96x128; the video first."),
        click.option("--kind", "kinds", multiple=True, metavar="NAME=KIND",
                     help="What an output of it is: logits, map, boxes, scores or array; in order for a tuple."),
        click.option("--preprocess", multiple=True, metavar="KEY=VALUE",
                     help="How its frames are made: imagenet, mean=R,G,B, std=R,G,B, resize=N, frames=N, "
                          "frame_rate=N, colour_order=BGR; repeatable."),
        click.option("--no-causal", is_flag=True, help="A frame's result depends on later frames."),
        click.option("--whole-clip", is_flag=True, help="Forward reads a clip as one and gives one row."),
    )):  # fmt: skip
        command = option(command)
    return command


def description_of(
    shapes: Sequence[str], kinds: Sequence[str], preprocess: Sequence[str], no_causal: bool, whole_clip: bool
) -> Description | None:
    """Return what the options say of a module; None if they say nothing.

    Raises:
        UsageError: a value can't be read, or an option is given without the shapes.
    """
    if not shapes:
        if kinds or preprocess or no_causal or whole_clip:
            raise UsageError("a module is described by its inputs", hint="give --input frames=3xHxW too")
        return None
    sizes = {name: _sizes(name, text) for name, text in parse_pairs("--input", shapes).items()}
    from dvexport.models.described import Description
    from dvexport.ports import Output

    return Description(
        sizes,
        _preprocess(preprocess, next(iter(sizes.values()))) if preprocess else None,
        [Output(name, kind) for name, kind in parse_pairs("--kind", kinds, _KIND_HINT).items()],  # type: ignore[arg-type]
        causal=not no_causal,
        whole_clip=whole_clip,
    )


def _sizes(name: str, text: str) -> tuple[int, ...]:
    sizes = text.split("x") if text else []
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UsageError("--input takes NAME=SIZES", where=f"--input {name}={text}", hint="--input frames=3x96x128")
    return tuple(int(size) for size in sizes)


def _preprocess(texts: Sequence[str], video: tuple[int, ...]) -> Preprocess:
    from dvexport.models.base import imagenet_preprocess
    from dvexport.video.preprocess import Preprocess

    size = video[1:]
    if len(size) != 2:
        raise UsageError("the first --input is the video", hint="--input frames=3x96x128")
    base = imagenet_preprocess((size[0], size[1]), Preprocess.frames).to_dict()
    given = parse_pairs("--preprocess", [text for text in texts if text != _IMAGENET])
    if _IMAGENET not in texts and not {"mean", "std"} <= given.keys():
        raise UsageError(
            "--preprocess has to tell the normalisation", hint="--preprocess imagenet, or mean=R,G,B and std=R,G,B"
        )
    return Preprocess.from_dict({**base, **{key: _value(key, text) for key, text in given.items()}})


def _value(key: str, text: str) -> Any:
    try:
        if key in _LISTS:
            return [_LISTS[key](part) for part in text.split(",")]
        return _NUMBERS.get(key, str)(text)
    except ValueError:
        raise UsageError("the preprocessing is not usable", where=f"--preprocess {key}={text}") from None
