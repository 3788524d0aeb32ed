"""`dvexport run`: what a model gives for a video."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dvexport.cli.options import bundle_argument, inputs_option, json_flag, path_option, threads_option, trust_flag
from dvexport.cli.output import print_json, print_lines, print_table
from dvexport.numbers import INT_MAX

if TYPE_CHECKING:
    from dvexport.run.run import RunResult

__all__ = ["run"]


@click.command()
@bundle_argument
@path_option("--clip", help="Video to run on: a file, a folder of numbered images, or camera:0.", required=True)
@click.option("--frames", type=click.IntRange(1, INT_MAX), help="Stop a stream after so many frames.")
@inputs_option
@path_option("--output", help="Write every output to this .npz file: arrays by name, frames first.")
@path_option("--pictures", help="Write maps and boxes as a PNG a frame into this folder.")
@threads_option
@trust_flag
@json_flag
def run(
    bundle: Path,
    clip: Path,
    frames: int | None,
    inputs: Path | None,
    output: Path | None,
    pictures: Path | None,
    threads: int,
    trust: bool,
    as_json: bool,
) -> None:
    """Run a bundle on a video.

    Prints the classes of a classifier, the most probable first, and of other models what each output holds.
    A camera is read frame by frame until Ctrl-C or --frames, and needs a bundle of stream mode.
    A bundle of backend tvm is a program. It runs if you exported it on this machine, any other with --trust.
    """
    from dvexport.bundle.archive import Bundle
    from dvexport.files import writable_output

    opened = Bundle.open(bundle, trust=trust)
    from dvexport.run.run import FramePrediction
    from dvexport.run.run import run as run_clip
    from dvexport.video.sources import is_camera

    def show(frame: FramePrediction) -> None:
        print_lines(f"{frame.time:8.2f} s {frame.probability:7.2%} {frame.label}")

    if output is not None:
        writable_output(output)
    tell = show if is_camera(clip) and not as_json else None
    result = run_clip(opened, clip, threads, inputs=inputs, images=pictures is not None, limit=frames, tell=tell)
    if output is not None:
        _write(result, output)
    if pictures is not None:
        from dvexport.run.pictures import write_pictures

        write_pictures(result, pictures)
    if as_json:
        print_json(result.to_dict())
    elif result.top:
        rows = [(f"{probability:7.2%}", label) for label, probability in result.top]
        print_table(("probability", "class"), rows, right=("probability",))
    else:
        _print_outputs(result)


def _print_outputs(result: RunResult) -> None:
    columns = ("shape", "min", "mean", "max")
    rows = [
        (one.name, one.kind, "x".join(map(str, one.shape)), *(f"{value:.4g}" for value in (one.min, one.mean, one.max)))
        for one in result.summaries()
    ]
    print_table(("output", "kind", *columns), rows, right=columns)


def _write(result: RunResult, path: Path) -> None:
    import numpy as np

    from dvexport.files import atomic_write

    with atomic_write(path) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, **dict(result.outputs))  # type: ignore[arg-type]
