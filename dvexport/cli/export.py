"""`dvexport export`: from a model and a checkpoint to a bundle."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dvexport.cli.closing import backend_line, next_line, saved_lines
from dvexport.cli.described import description_of, description_options
from dvexport.cli.options import inputs_option, parse_choice, parse_pairs, path_option
from dvexport.cli.output import checklist, file_size, print_lines
from dvexport.errors import UntoldError
from dvexport.names import MODES
from dvexport.targets.discover import BACKENDS

if TYPE_CHECKING:
    from dvexport.bundle.manifest import Manifest, ModelEntry

__all__ = ["export", "memory_line", "origin_lines", "trust_line"]


@click.command()
@click.argument("model")
@path_option("--checkpoint", help="Weights of the model, in the layout of its authors or of dvexport.")
@click.option("--weights-key", metavar="KEY", help="Where the weights stand in it, such as model_ema; a.b is b in a.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Option of the model; repeatable.")
@click.option("--assume-defaults", is_flag=True, help="Take official defaults of options that nothing tells.")
@click.option("--target", default="host", show_default=True, help="Device, see `dvexport targets`, or a .toml file.")
@parse_choice("backend", BACKENDS, default=None, otherwise="; the best that is installed and fits the target")
@parse_choice("mode", MODES, default=None, otherwise="; stream where the model can")
@click.option("--lowering", multiple=True, metavar="GATE=KIND", help="Overrule the lowering of one gate; repeatable.")
@click.option("--opset", type=int, help="Opset of ONNX to write, for backend onnx.  [default: the target's]")
@path_option("--calibrate", help="Video whose decisions say what to expect of each gate.")
@inputs_option
@description_options
@path_option("-o", "--output", help="Bundle to write.", required=True)
@click.option("-v", "--verbose", is_flag=True, help="Name each kernel that is compiled.")
def export(
    model: str,
    checkpoint: Path | None,
    weights_key: str | None,
    settings: tuple[str, ...],
    assume_defaults: bool,
    target: str,
    backend: str | None,
    mode: str | None,
    lowering: tuple[str, ...],
    opset: int | None,
    calibrate: Path | None,
    inputs: Path | None,
    output: Path,
    verbose: bool,
    **told: Any,
) -> None:
    """Export MODEL to a bundle.

    MODEL is a name of the zoo (`dvexport models`), package.module:factory, or a directory that
    save_pretrained of Hugging Face's library wrote.
    """
    options = parse_pairs("--set", settings)
    overrides = parse_pairs("--lowering", lowering)
    description = description_of(**told)
    from dvexport.export import bundle_output

    bundle_output(output)
    with _paste_ready(click.get_current_context().params), checklist(verbose) as progress:
        from dvexport.export import export as run_export
        from dvexport.run.savings import savings_of
        from dvexport.targets import catalogue
        from dvexport.targets.registry import best_backend

        device = catalogue.load(target)
        taken, refused = (backend, {}) if backend else best_backend(device, overrides)
        bundle = run_export(
            model,
            checkpoint=checkpoint,
            settings=options,
            assume_defaults=assume_defaults,
            weights_key=weights_key,
            target=target,
            backend=taken,
            mode=mode,
            output=output,
            lowering=overrides,
            opset=opset,
            calibrate=calibrate,
            inputs=inputs,
            description=description,
            progress=progress,
        )
    manifest = bundle.manifest
    kinds = Counter(gate.lowering for gate in manifest.gates)
    gates = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
    print_lines(
        f"{output}: {manifest.model.name} for {manifest.target} ({manifest.backend}, {manifest.mode}), "
        f"{file_size(bundle.path.stat().st_size)}",
        f"gates: {gates}",
        *(saved_lines(savings_of(bundle), manifest.backend, device) if output.is_file() else []),
        *([] if backend else [backend_line(taken, refused)]),
        *memory_line(manifest.memory),
        *origin_lines(manifest.model),
        *trust_line(manifest),
        next_line(manifest, output, device),
    )


def trust_line(manifest: Manifest) -> list[str]:
    """Return the line that says that this export could not be remembered, none if it was, or needs not be."""
    from dvexport.bundle.trust import exports_folder, has_code, made_here

    if not has_code(manifest) or made_here(manifest):
        return []
    where = exports_folder() or "there is no folder for it"
    return [f"this export can't be remembered as yours ({where}): running it needs --trust here too"]


def memory_line(memory: Mapping[str, int]) -> list[str]:
    """Return the line that says what an instance needs on the device, none where the backend does not know."""
    if not memory:
        return []
    working, states, weights = (file_size(memory[key]) for key in ("arena", "states", "weights"))
    made = memory.get("derived", 0)
    more = f", {file_size(made)} made of them when it is opened" if made else ""
    return [f"memory: {working} for a step, {states} of states, {weights} of weights{more}"]


def origin_lines(model: ModelEntry) -> list[str]:
    """Return lines that say where the options of an imported model come from, none if nothing was imported."""
    from dvexport.models.checkpoints.untold import as_settings

    overrule = (
        "overrule with --set"
        if not {"mean", "std"} & model.assumed.keys()
        else "a preprocessor_config.json beside config.json would"
    )
    parts = (
        ("inferred", model.inferred, ""),
        ("given", model.settings, ""),
        ("assumed", model.assumed, f"  (nothing tells it; {overrule})"),
    )
    if not model.inferred and not model.assumed:
        return []
    lines = [f"{name}: {' '.join(as_settings(options))}{note}" for name, options, note in parts if options]
    return lines + [f"note: {note}" for note in model.notes]


@contextmanager
def _paste_ready(params: Mapping[str, Any]) -> Iterator[None]:
    """Where options were left open, end the error with the whole command that sets them."""
    try:
        yield
    except UntoldError as error:
        if not error.settings:
            raise
        command = shlex.join(_command({**params, "settings": (*params["settings"], *error.settings)}))
        note = "(with the official defaults: change what differs; --assume-defaults takes them all)"
        raise UntoldError(
            error.what,
            where=error.where or "",
            why=error.why or "",
            hint=f"{command}\n       {note}",
            settings=error.settings,
        ) from None


def _command(params: Mapping[str, Any]) -> list[str]:
    """Return the words of the export command with `params`."""
    words = ["dvexport", "export", str(params["model"])]
    for option in export.params:
        value = params[option.name or ""]
        if not isinstance(option, click.Option) or value in (None, False, option.default):
            continue
        for each in value if option.multiple else (value,):
            words += [option.opts[-1 if option.name != "output" else 0], str(each)]
    return words
