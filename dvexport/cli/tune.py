"""`dvexport tune`: measure what the compiled kernels cost on this machine."""

from __future__ import annotations

import platform
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dvexport.cli.options import Seconds, json_flag, path_option
from dvexport.cli.output import checklist, print_json, print_lines
from dvexport.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from dvexport.targets.catalogue import Target
    from dvexport.targets.tvm.machine.rates import Parameters, Rates
    from dvexport.targets.tvm.tuning.fit import Fit

__all__ = ["tune"]


@click.command()
@click.option("--target", default="host", show_default=True, help="Device of the catalogue, or a .toml file.")
@path_option("-o", "--output", help="Write the target's file with both tables in it: a .toml file for --target.")
@click.option(
    "--seconds",
    default=60.0,
    show_default=True,
    type=Seconds(),
    help="How long to repeat each of the two measurements.",
)
@click.option("--keep-parameters", is_flag=True, help="Measure the rates of the kernels as they are.")
@json_flag
def tune(target: str, output: Path | None, seconds: float, keep_parameters: bool, as_json: bool) -> None:
    """Measure which kernels are the fastest on this machine, and how long their units of work take.

    Backend tvm generates convolutions with these parameters, such as their register blocks. It predicts from the rates
    which kernel is the fastest for what a gate decides, and which calls are worth sharing between threads. Let nothing
    else run meanwhile.
    """
    from dvexport.files import atomic_write, writable_output
    from dvexport.targets import catalogue
    from dvexport.targets.tvm.tuning import target_file

    device = catalogue.load(target)
    _check(device)
    if output is not None:
        writable_output(output)
    with checklist() as progress:
        from dvexport.targets.tvm.build.compile import check_tools

        check_tools()
        from dvexport.targets.tvm.machine.machine import machine_for
        from dvexport.targets.tvm.tuning import fit, measure
        from dvexport.targets.tvm.tuning.parameters import choose_parameters
        from dvexport.targets.tvm.tuning.workloads import draw_works, workloads

        machine = machine_for(device)
        if not keep_parameters:
            machine = replace(machine, parameters=choose_parameters(machine, seconds, _source(), progress))
        samples = measure.measure(machine, draw_works(workloads("rates")), seconds, progress)
        progress("fit the rates")
        made = fit.fit(samples, machine, _source())
    measured: list[Rates | Parameters] = [made.rates]
    if machine.parameters is not None:
        measured.append(machine.parameters)
    if output is not None:
        text = catalogue.path_of(target).read_text(encoding="utf-8")
        with atomic_write(output) as temporary:
            temporary.write_text(target_file.with_measured(text, *measured), encoding="utf-8")
    if as_json:
        print_json(_as_json(device, made, machine.parameters))
        return
    print_lines(*[target_file.measured_table(each) for each in measured])
    print_lines(*_quality(made))


def _source() -> str:
    from dvexport.profile.environment import processor

    return f"measured: dvexport tune, {processor()}, {datetime.now(UTC):%Y-%m-%d}"


def _check(device: Target) -> None:
    from dvexport.targets.catalogue import runs_here
    from dvexport.targets.tvm.table import TvmTable

    if device.runtime(TvmTable) is None:
        raise UsageError("compiled kernels are not among the target's runtimes", where=device.name)
    if not runs_here(device.cpu):
        raise DeviceError(
            "the target is not this machine, so its rates can't be measured here",
            where=device.name,
            why=f"it is {device.cpu.triple}, this machine is {platform.machine()}",
            hint="run dvexport tune there; without rates they are estimated",
        )


def _quality(made: Fit) -> list[str]:
    return [
        f"predicted to {made.median:.0%} (half of the calls), {made.ninth:.0%} (nine of ten)",
        f"the faster of two kernels in {made.right} of {made.choices} cases; the others cost {made.lost:.2%} of time",
    ]


def _as_json(device: Target, made: Fit, parameters: Parameters | None) -> dict[str, object]:
    return {
        "target": device.name,
        "parameters": parameters and {"source": parameters.source, **parameters.values()},
        "rates": {"source": made.rates.source, **made.rates.values()},
        "error": {"median": made.median, "p90": made.ninth},
        "choices": {"cases": made.choices, "right": made.right, "lost": made.lost},
    }
