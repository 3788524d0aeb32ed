"""`dvexport run`: predictions for a video."""

from __future__ import annotations

from pathlib import Path

import click

from dvexport.cli.options import bundle_argument, json_flag, path_option, threads_option, trust_flag
from dvexport.cli.output import print_json, print_table

__all__ = ["run"]


@click.command()
@bundle_argument
@path_option("--clip", help="Video to classify.", required=True)
@threads_option
@trust_flag
@json_flag
def run(bundle: Path, clip: Path, threads: int, trust: bool, as_json: bool) -> None:
    """Classify a video, the most probable class first.

    A bundle of backend tvm is a program. It runs if you exported it on this machine, any other with --trust.
    """
    from dvexport.bundle.archive import Bundle

    opened = Bundle.open(bundle, trust=trust)
    from dvexport.run.run import run as run_clip

    result = run_clip(opened, clip, threads)
    if as_json:
        print_json(result.to_dict())
        return
    rows = [(f"{probability:7.2%}", label) for label, probability in result.top]
    print_table(("probability", "class"), rows, right=("probability",))
