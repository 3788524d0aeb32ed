"""`dvexport profile`: what the gates save, in multiply-accumulates and in measured time."""

from __future__ import annotations

from pathlib import Path

import click

from dvexport.cli.options import (
    Seconds,
    bundle_argument,
    inputs_option,
    parse_force,
    path_option,
    threads_option,
    trust_flag,
)
from dvexport.cli.output import checklist, print_lines
from dvexport.errors import DeviceError
from dvexport.numbers import MOST_RUNS

__all__ = ["profile"]

LOCAL = "local"


@click.command()
@bundle_argument
@path_option(
    "--clip", help="Video to profile on, or a folder of numbered images.  [default: the bundle's golden frames]"
)
@inputs_option
@click.option("--device", default=LOCAL, show_default=True, help="Where to run; this release: local.")
@threads_option
@click.option("--force", metavar="channels=P,tiles=P", help="Replace the decisions by random ones at these rates.")
@click.option("--runs", default=10, show_default=True, type=click.IntRange(1, MOST_RUNS), help="Passes over the clip.")
@click.option(
    "--warmup",
    default=1.0,
    show_default=True,
    type=Seconds(),
    help="Seconds run before measuring.",
)
@path_option("--json", "json_file", help="Write the result as JSON.")
@path_option("--html", "html_file", help="Write the result as one self-contained page.")
@path_option("--trace", "trace_file", help="Write a trace for chrome://tracing or Perfetto.")
@trust_flag
def profile(
    bundle: Path,
    clip: Path | None,
    inputs: Path | None,
    device: str,
    threads: int,
    force: str | None,
    runs: int,
    warmup: float,
    json_file: Path | None,
    html_file: Path | None,
    trace_file: Path | None,
    trust: bool,
) -> None:
    """Measure what the gates save.

    The bundle and the dense artifact of its model run interleaved, so both meet the same machine.
    A bundle of backend tvm is a program. It runs if you exported it on this machine, any other with --trust.
    """
    rates = parse_force(force) if force is not None else {}
    _check_device(device)
    from dvexport.bundle.archive import Bundle
    from dvexport.files import writable_output

    for path in filter(None, (json_file, html_file, trace_file)):
        writable_output(path)
    with checklist() as progress:
        progress("check the bundle's files")
        opened = Bundle.open(bundle, trust=trust)
        from dvexport.profile import profile as run_profile

        result = run_profile(
            opened,
            clip=clip,
            inputs=inputs,
            device=device,
            threads=threads,
            force=rates,
            runs=runs,
            warmup_s=warmup,
            progress=progress,
        )
    from dvexport.profile.report_text import print_result

    print_result(result)
    if json_file:
        from dvexport.profile.advice import advise
        from dvexport.profile.result import write_json

        write_json(result, json_file, [advice.to_dict() for advice in advise(result)])
    if html_file:
        from dvexport.profile.clip import load_clip
        from dvexport.profile.report import write_html

        images = load_clip(opened, clip, inputs).images
        write_html(result, html_file, images if result.whole_clip else images[: len(result.steps)])
    if trace_file:
        from dvexport.profile.trace_events import write_trace

        write_trace(result, trace_file)
    print_lines(*(f"wrote {path}" for path in (json_file, html_file, trace_file) if path))


def _check_device(device: str) -> None:
    if device != LOCAL:
        raise DeviceError(
            f"profiling on '{device}' is not available in this release",
            why="ssh: and adb: devices are still to come",
            hint=f"--device {LOCAL} measures on this machine",
        )
