"""`dvexport slim`: what a device needs of a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from dvexport.cli.options import bundle_argument, path_option
from dvexport.cli.output import file_size, print_lines

__all__ = ["slim"]


@click.command()
@bundle_argument
@path_option("-o", "--output", help="The slim bundle.", required=True)
def slim(bundle: Path, output: Path) -> None:
    """Write what a device needs of a bundle to a smaller one.

    The artifact stays as it is. Left out are the traced model, the golden data and all else that proves the artifact
    or measures it: of these the slim bundle keeps digests. "dvexport verify SLIM.dvx --whole WHOLE.dvx" compares both.
    """
    from dvexport.bundle.archive import Bundle
    from dvexport.bundle.slim import slim as make_slim
    from dvexport.targets.registry import backend_of

    whole = Bundle.open(bundle)
    made = make_slim(whole, output, backend_of(whole.manifest.backend).needed(whole))
    sizes = [file_size(path.stat().st_size) for path in (output, bundle)]
    print_lines(
        f"{output}: {sizes[0]}, {bundle.name} has {sizes[1]}",
        f"left out: {', '.join(sorted(made.manifest.left_out.keys() - made.manifest.files.keys()))}",
        f"next: dvexport run {output} --clip VIDEO, on the device",
    )
