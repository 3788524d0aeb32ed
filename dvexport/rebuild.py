"""The PyTorch model that a bundle was made from, built again for `verify` without trusting the bundle.

A manifest may name a model of the zoo, with options inside bounds that fit the bundle's own shapes. Nothing else
that it names is imported, opened or called: a factory or a saved directory is the user's to name, and what is given
to a factory too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvexport.errors import BundleError, UsageError
from dvexport.ports import LOGITS, input_shapes, outputs_of

if TYPE_CHECKING:
    from torch import nn

    from dvexport.bundle.manifest import Manifest

__all__ = ["MAX_BLOCKS", "MAX_NUMBER", "rebuild"]

MAX_NUMBER = 1 << 16
"""The largest number that a bundle may give as an option: of channels, units, tokens; far above any published model."""
MAX_BLOCKS = 256
"""The most blocks that a bundle may ask for: building one takes milliseconds."""
_MAX_QUOTA = 1 << 24
_LABELS = "labels"
"""A file on the machine that exported; names of classes change no number."""
_FREE = ("sta_seed",)
"""Options whose size costs nothing."""

_SLACK = 64 << 20
"""Bytes that a model may have beyond twice the bundle's: what a trace leaves out or folds, tables held once a block."""


def rebuild(
    manifest: Manifest,
    *,
    model: str | nn.Module | None = None,
    checkpoint: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    inputs: Mapping[str, tuple[int, ...]],
    outputs: Mapping[str, tuple[int, ...]],
) -> tuple[Any, tuple[str, ...]]:
    """Return the model in evaluation mode, or None where it is not built; and what there is to say about that.

    Args:
        model: the user's word for what the bundle was made from: `package.module:factory`, a directory that Hugging
            Face's library saved, a name of the zoo, or the module itself. None: the manifest's, if it is of the
            zoo.
        checkpoint: weights; compared with the manifest's digest.
        settings: options for a factory that the user names: those that the bundle was exported with.
        inputs, outputs: shapes of one frame in the golden data, by name: the manifest may say anything.

    Raises:
        UsageError: `checkpoint`, `settings` or the model are not those of the bundle.
        BundleError: the manifest's options are out of bounds, or contradict the bundle's shapes.
        CheckpointError: weights that can't be read.
    """
    if model is not None and not isinstance(model, str):
        net, notes = _given(model, manifest, checkpoint, settings)
        _check_shapes(net, inputs, outputs)
        return net, notes
    from dvexport.models import zoo

    name = manifest.model.name if model is None else model
    if model is not None:
        name, checkpoint = zoo.saved_directory(name, checkpoint)
    if checkpoint is not None:
        _check_digest(manifest, checkpoint)
    own = name not in zoo.names() and name != zoo.DIRECTORY
    if own and model is None:
        return None, (f"not compared with PyTorch: {_unnamed(name)}",)
    if settings and not own:
        raise UsageError("only a factory of your own is given options", where=name, why="others have the bundle's")
    if checkpoint is None and (manifest.checkpoint is not None or name == zoo.DIRECTORY):
        what = " DIR, the directory it was made from" if name == zoo.DIRECTORY else ""
        return None, (f"not compared with PyTorch: give --checkpoint{what}",)
    try:
        import torch  # noqa: F401
    except ImportError as error:  # a device that only runs bundles has no torch
        return None, (f"not compared with PyTorch: {error}",)
    if own:
        options = _same_settings(manifest, settings or {}, name)
    else:
        sizes = {"size": next(iter(inputs.values()))[1:], "classes": outputs.get(LOGITS, (0,))[0]}
        options = _bounded(manifest, name, {**sizes, "frames": manifest.preprocess.frames})
    net = _built(name, checkpoint, options, manifest)
    _check_shapes(net, inputs, outputs)
    return net, _other_name(name, manifest)


def _unnamed(name: str) -> str:
    """Say why a model that is not of the zoo is left out, and how to have it compared."""
    told = name if name.isprintable() and len(name) <= 100 else repr(name[:100])
    if ":" in name:
        return f"the bundle was made from '{told}', code that is not dvexport's; if it is yours, name it with --model"
    return f"the bundle was made from a model called '{told}', which is not of the zoo; name its factory with --model"


def _given(
    model: nn.Module, manifest: Manifest, checkpoint: str | Path | None, settings: Mapping[str, Any] | None
) -> tuple[Any, tuple[str, ...]]:
    from dvexport.export import build_model

    source = build_model(model, checkpoint, settings or {}, description=_description(manifest))
    return source.model, _other_name(source.name, manifest)


def _description(manifest: Manifest) -> Any:
    """Return what the bundle says of its model, for a module that says nothing of itself."""
    from dvexport.models.described import Description

    rows, frames = manifest.outputs[0].shape[0], manifest.inputs[0].shape[0]
    return Description(
        {entry.name: entry.shape[1:] for entry in manifest.inputs},
        manifest.preprocess,
        manifest.declared_outputs,
        whole_clip=rows == 1 < frames,
        fallback=True,
    )


def _check_shapes(net: Any, inputs: Mapping[str, tuple[int, ...]], outputs: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UsageError where a model can't have made the bundle's results."""
    ours, names = input_shapes(net), [output.name for output in outputs_of(net)]
    checks: list[tuple[str, Any, Any]] = [
        ("inputs", list(ours), list(inputs)),
        ("frames of", next(iter(ours.values()))[1:], tuple(next(iter(inputs.values()))[1:])),
        ("inputs of", list(ours.values()), [tuple(shape) for shape in inputs.values()]),
        ("outputs", names, list(outputs)),
    ]
    if list(outputs) == [LOGITS] and net.labels:
        checks.append(("classes:", len(net.labels), outputs[LOGITS][0]))
    for what, found, wanted in checks:
        if found != wanted:
            raise UsageError(
                "this is not the model that the bundle was made from",
                where=net.name,
                why=f"it has {what} {_text(found)}, and the bundle's results {_text(wanted)}",
            )


def _other_name(name: str, manifest: Manifest) -> tuple[str, ...]:
    """Say that the model compared is not called as the bundle calls it: the numbers decide whether it is the one."""
    if name == manifest.model.name:
        return ()
    return (f"compared with PyTorch as '{name}', which you named; the bundle says '{manifest.model.name}'",)


def _check_digest(manifest: Manifest, checkpoint: str | Path) -> None:
    from dvexport.export import file_digest

    if manifest.checkpoint is None:
        raise UsageError("the bundle was not made from a checkpoint", where=str(checkpoint), hint="leave it out")
    if file_digest(checkpoint) != manifest.checkpoint:
        raise UsageError(
            "this is not the checkpoint that the bundle was made from",
            where=str(checkpoint),
            why="its SHA-256 is not the one in the manifest",
        )


def _same_settings(manifest: Manifest, given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the user's options for the user's factory; UsageError unless the bundle was exported with the same.

    A factory may open what an option names, so none comes from the bundle.
    """
    said = {key: _text(value) for key, value in manifest.model.settings.items() if key != _LABELS}
    ours = {key: value for key, value in given.items() if key != _LABELS}
    if {key: _text(value) for key, value in ours.items()} != said:
        options = " ".join(f"--set {key}={value}" for key, value in said.items())
        raise UsageError(
            f"the bundle was exported with other options for {name}",
            why="a factory of your own gets only options that you give: a bundle's may name files",
            hint=f"if these are right: {options}" if options else "leave out --set",
        )
    return ours


def _text(value: Any) -> str:
    """Return an option as `--set` writes it."""
    return ",".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def _bounded(manifest: Manifest, name: str, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest's options for a model of dvexport's own, checked before anything is built.

    Args:
        shapes: what the options of these names must be, if they are given.
    """
    from dvexport.models import zoo

    entry, known = manifest.model, zoo.options(name)
    # What the export assumed is given too: another version may have other defaults.
    given = {**{key: value for key, value in entry.assumed.items() if key in known}, **entry.settings}
    parsed = zoo.parsed_settings(name, {key: value for key, value in given.items() if key != _LABELS})
    for option, value in parsed.items():
        for number in value if isinstance(value, tuple) else (value,):
            _check_number(option, number)
    blocks = sum(_numbers(parsed.get("depth"))) + sum(_numbers(parsed.get("depths")))
    if blocks > MAX_BLOCKS:
        raise _unfit("depth", f"{blocks} blocks are more than {MAX_BLOCKS}")
    for option, wanted in shapes.items():
        if option in parsed and parsed[option] != wanted:
            raise _unfit(option, f"it says {option}={_text(parsed[option])}, and its own shapes {_text(wanted)}")
    return parsed


def _numbers(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value or 0,)


def _check_number(option: str, value: Any) -> None:
    if isinstance(value, str) or value is None or option in _FREE:
        return
    most = _MAX_QUOTA if option == "hidden_quota" else MAX_NUMBER
    if not math.isfinite(value) or abs(value) > most:
        raise _unfit(option, f"{value} is no number from {-most} to {most}")


def _unfit(option: str, why: str) -> BundleError:
    return BundleError(
        "the bundle's options can't be those of its model", where=f"manifest.json, model.settings.{option}", why=why
    )


def _built(name: str, checkpoint: str | Path | None, options: Mapping[str, Any], manifest: Manifest) -> Any:
    from dvexport.export import build_model
    from dvexport.models import zoo

    if name in zoo.names() and checkpoint is None:
        most = 2 * sum(entry.size for entry in manifest.files.values()) + _SLACK
        if (size := zoo.weight_bytes(name, options)) > most:
            raise _unfit("*", f"its weights and tables take {size} bytes, more than {most} for a bundle of its size")
    description = _description(manifest) if ":" in name else None
    key = manifest.model.weights_key
    return build_model(name, checkpoint, options, assume_defaults=True, description=description, weights_key=key).model
