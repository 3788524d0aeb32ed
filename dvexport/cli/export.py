"""`dvexport export`: from a model and a checkpoint to a bundle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dvexport.cli.options import BACKENDS, MODES, parse_choice, parse_pairs, path_option
from dvexport.cli.output import checklist, file_size, print_lines

if TYPE_CHECKING:
    from dvexport.bundle_manifest import Manifest

__all__ = ["assumed_line", "export", "memory_line", "trust_line"]


@click.command()
@click.argument("model")
@path_option("--checkpoint", help="Weights of the model, in the layout of its authors or of dvexport.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Option of the model; repeatable.")
@click.option("--target", default="host", show_default=True, help="Device, see `dvexport targets`, or a .toml file.")
@parse_choice("backend", BACKENDS, default="onnx")
@parse_choice("mode", MODES, default=None, otherwise="; stream where the model can")
@click.option("--lowering", multiple=True, metavar="GATE=KIND", help="Overrule the lowering of one gate; repeatable.")
@path_option("--calibrate", help="Video whose decisions say what to expect of each gate.")
@path_option("-o", "--output", help="Bundle to write.", required=True)
def export(
    model: str,
    checkpoint: Path | None,
    settings: tuple[str, ...],
    target: str,
    backend: str,
    mode: str | None,
    lowering: tuple[str, ...],
    calibrate: Path | None,
    output: Path,
) -> None:
    """Export MODEL to a bundle.

    MODEL is a name of the zoo (`dvexport models`), package.module:factory, or a directory that
    save_pretrained of Hugging Face's library wrote.
    """
    options = parse_pairs("--set", settings)
    overrides = parse_pairs("--lowering", lowering)
    from dvexport.files import writable_output

    writable_output(output)
    with checklist() as progress:
        from dvexport.export import export as run_export

        bundle = run_export(
            model,
            checkpoint=checkpoint,
            settings=options,
            target=target,
            backend=backend,
            mode=mode,
            output=output,
            lowering=overrides,
            calibrate=calibrate,
            progress=progress,
        )
    manifest = bundle.manifest
    kinds = Counter(gate.lowering for gate in manifest.gates)
    gates = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
    print_lines(
        f"{output}: {manifest.model.name} for {manifest.target} ({manifest.backend}, {manifest.mode}), "
        f"{file_size(bundle.path.stat().st_size)}",
        f"gates: {gates}",
        *memory_line(manifest.memory),
        *assumed_line(manifest.model.assumed),
        *trust_line(manifest),
        f"next: dvexport verify {output}",
    )


def trust_line(manifest: Manifest) -> list[str]:
    """Return the line that says that this export could not be remembered, none if it was, or needs not be."""
    from dvexport.trust import exports_folder, has_code, made_here

    if not has_code(manifest) or made_here(manifest):
        return []
    where = exports_folder() or "there is no folder for it"
    return [f"this export can't be remembered as yours ({where}): running it needs --trust here too"]


def memory_line(memory: Mapping[str, int]) -> list[str]:
    """Return the line that says what an instance needs on the device, none where the backend does not know."""
    if not memory:
        return []
    working, states, weights = (file_size(memory[key]) for key in ("arena", "states", "weights"))
    return [f"memory: {working} for a step, {states} of states, {weights} of weights"]


def assumed_line(assumed: Mapping[str, Any]) -> list[str]:
    """Return the line that says which options no weights told, none if there are none."""
    if not assumed:
        return []
    told = " ".join(f"{key}={','.join(map(str, v)) if isinstance(v, list) else v}" for key, v in assumed.items())
    return [f"assumed, as no weights tell it: {told}  (overrule with --set)"]
