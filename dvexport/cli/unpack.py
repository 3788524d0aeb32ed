"""`dvexport unpack`: the files of a bundle in a folder."""

from __future__ import annotations

from pathlib import Path

import click

from dvexport.cli.options import bundle_argument, path_option
from dvexport.cli.output import file_size, print_lines, print_table

__all__ = ["unpack"]


@click.command()
@bundle_argument
@path_option("-o", "--output", help="The folder; it must not exist yet, or be empty.", required=True)
def unpack(bundle: Path, output: Path) -> None:
    """Write the files of a bundle into a folder, for who loads them without dvexport.

    Every byte is checked first. A bundle is a zip, so any unzip does the same without the check.
    """
    from dvexport.bundle.archive import Bundle
    from dvexport.bundle.unpack import unpack as write_files
    from dvexport.targets.registry import backend_of

    opened = Bundle.open(bundle)
    paths = write_files(opened, output)
    print_table(("file", "size"), [(str(path), file_size(path.stat().st_size)) for path in paths], right=("size",))
    print_lines(f"next: {backend_of(opened.manifest.backend).loading}")
