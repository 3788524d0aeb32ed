"""`dvexport checkpoint`: what is in a file of weights."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dvexport.cli.options import json_flag, plain_path
from dvexport.cli.output import print_fields, print_json, print_lines

if TYPE_CHECKING:
    from dvexport.models.checkpoints.contents import Contents

__all__ = ["checkpoint"]


@click.command()
@click.argument("file", type=plain_path)
@click.option("--weights-key", metavar="KEY", help="Where the weights stand in it, such as model_ema; a.b is b in a.")
@json_flag
def checkpoint(file: Path, weights_key: str | None, as_json: bool) -> None:
    """Show what is in a checkpoint: layout, likely model, options that it tells and leaves open.

    FILE is a torch file, safetensors, or a directory that save_pretrained wrote. Nothing of it runs.
    """
    from dvexport.models.checkpoints.contents import contents_of

    found = contents_of(file, weights_key)
    if as_json:
        print_json(found.to_dict())
        return
    fields = [
        ("layout", found.layout or "unknown"),
        ("model", found.model or "none"),
        ("weights", f"{found.tensors} tensors, {found.parameters / 1e6:.2f} million numbers"),
        *(("", line) for line in found.weights),
        ("tells", " ".join(found.told) or "-"),
        *(("leaves open", f"{option}: {what}") for option, what in found.untold.items()),
        *(("beside them", f"{name}: {kind}") for name, kind in found.others.items()),
        *(("names", name) for name in found.names),
        *([("no model", found.why)] if found.why else []),
    ]
    print_fields([(name, value) for name, value in fields])
    if found.model:
        print_lines("", f"next: {_command(found, weights_key)}")


def _command(found: Contents, weights_key: str | None) -> str:
    """Return the export command, with a place for each option that is left open."""
    if found.model == found.path:
        return f"dvexport export {shlex.quote(found.path)} -o OUT.dvx"
    key = f" --weights-key {shlex.quote(weights_key)}" if weights_key else ""
    settings = "".join(f" --set {option}=..." for option in found.untold)
    return f"dvexport export {found.model} --checkpoint {shlex.quote(found.path)}{key}{settings} -o OUT.dvx"
