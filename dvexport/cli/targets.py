"""`dvexport targets`: the device catalogue."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dvexport.cli.options import json_flag
from dvexport.cli.output import print_fields, print_json, print_table

if TYPE_CHECKING:
    from dvexport.targets.catalogue import Quantity, Target

__all__ = ["targets"]


@click.command()
@click.argument("name", required=False)
@json_flag
def targets(name: str | None, as_json: bool) -> None:
    """List the devices of the catalogue, or describe one.

    NAME is one of the catalogue, a .toml file, or `host` for this machine.
    """
    from dvexport.targets import catalogue

    if name is not None:
        _one(catalogue.load(name), as_json)
        return
    found = [catalogue.load(known) for known in catalogue.names()]
    if as_json:
        print_json([target.model_dump(mode="json") for target in found])
        return
    rows = [(t.name, t.cpu.mcpu, str(t.cpu.cores), " ".join(t.backends), t.title) for t in found]
    print_table(("target", "processor", "cores", "backends", "device"), rows, right=("cores",))


def _one(target: Target, as_json: bool) -> None:
    if as_json:
        print_json(target.model_dump(mode="json"))
        return
    cpu = target.cpu
    caches = f"L1 {cpu.l1_kib}, L2 {cpu.l2_kib}, L3 {cpu.l3_kib or 'none'} KiB"
    runs = "only the branch taken runs" if target.conditional == "lazy" else "both branches run"
    print_fields(
        [
            ("target", target.name),
            ("device", target.title),
            ("processor", cpu.model),
            ("compiled for", " ".join([cpu.triple, cpu.mcpu, *cpu.features])),
            ("vector", f"{cpu.lanes} float32 lanes"),
            ("cores", str(cpu.cores) + (f" of {cpu.all_cores}" if cpu.all_cores and cpu.all_cores > cpu.cores else "")),
            (
                "threads",
                f"up to {cpu.most_threads} in native bundles" if "tvm" in target.runtimes else "as the runtime takes",
            ),
            ("caches", caches),
            ("memory", f"{target.memory_mib} MiB"),
            ("peak", _figure(target.peak_gflops_per_core, "GFLOP/s a core")),
            ("bandwidth", _figure(target.bandwidth_gb_per_s, "GB/s")),
            ("backends", " ".join(target.backends)),
            ("conditional", f"{target.conditional}: {runs}"),
            ("dynamic shapes", "yes" if target.dynamic_shapes else "no"),
            (
                "cost table",
                f"{len(target.costs)} points" + (f", {target.costs_source}" if target.costs else ""),
            ),
            *(fact for table in target.tables for fact in table.facts()),
        ]
    )


def _figure(quantity: Quantity, unit: str) -> str:
    kind = "estimate" if quantity.estimated else "measured"
    return f"{quantity.value:g} {unit} ({kind}: {quantity.source})"
