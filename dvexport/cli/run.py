"""`dvexport run`: predictions for a video."""

from __future__ import annotations

from pathlib import Path

import click

from dvexport.cli.options import bundle_argument, json_flag, path_option, threads_option, trust_flag
from dvexport.cli.output import print_json, print_lines, print_table
from dvexport.numbers import INT_MAX

__all__ = ["run"]


@click.command()
@bundle_argument
@path_option("--clip", help="Video to classify: a file, a folder of numbered images, or camera:0.", required=True)
@click.option("--frames", type=click.IntRange(1, INT_MAX), help="Stop a stream after so many frames.")
@threads_option
@trust_flag
@json_flag
def run(bundle: Path, clip: Path, frames: int | None, threads: int, trust: bool, as_json: bool) -> None:
    """Classify a video, the most probable class first.

    A camera is classified frame by frame until Ctrl-C or --frames, and needs a bundle of stream mode.
    A bundle of backend tvm is a program. It runs if you exported it on this machine, any other with --trust.
    """
    from dvexport.bundle.archive import Bundle

    opened = Bundle.open(bundle, trust=trust)
    from dvexport.run.run import FramePrediction
    from dvexport.run.run import run as run_clip
    from dvexport.video.sources import is_camera

    def show(frame: FramePrediction) -> None:
        print_lines(f"{frame.time:8.2f} s {frame.probability:7.2%} {frame.label}")

    live = show if is_camera(clip) and not as_json else None
    result = run_clip(opened, clip, threads, limit=frames, seen=live)
    if as_json:
        print_json(result.to_dict())
        return
    rows = [(f"{probability:7.2%}", label) for label, probability in result.top]
    print_table(("probability", "class"), rows, right=("probability",))
