"""`dvexport verify`: whether the artifact computes what the model does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dvexport.cli.options import bundle_argument, inputs_option, json_flag, parse_pairs, path_option, trust_flag
from dvexport.cli.output import checklist, print_json, print_lines, print_table

if TYPE_CHECKING:
    from dvexport.run.seen import GateSeen

__all__ = ["verify"]


@click.command()
@bundle_argument
@path_option("--clip", help="Compare on this video too, or on a folder of numbered images.")
@inputs_option
@path_option("--checkpoint", help="Rebuild the model from these weights and compare with PyTorch.")
@click.option("--model", help="What it was made from, if not of the zoo: package.module:factory or a directory.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Option for that factory; repeatable.")
@path_option("--whole", help="For a slim bundle: the whole one that it was made of, which is then verified.")
@trust_flag
@json_flag
def verify(
    bundle: Path,
    clip: Path | None,
    inputs: Path | None,
    checkpoint: Path | None,
    model: str | None,
    settings: tuple[str, ...],
    whole: Path | None,
    trust: bool,
    as_json: bool,
) -> None:
    """Compare a bundle with the PyTorch model.

    A bundle is compared with models of the zoo by its own word. Code of yours is imported only if you name it.
    A bundle of backend tvm is a program. It runs if you exported it on this machine, any other with --trust.

    Compares numbers and gate decisions, on the golden data in the bundle and on a video, and numbers under
    decisions that are forced, so that every gate is exercised. Tells what was seen of each gate.
    Exits with 1 if a comparison does not hold.
    """
    options = parse_pairs("--set", settings)
    from dvexport.bundle.archive import Bundle
    from dvexport.errors import CheckFailed

    with checklist() as progress:
        progress("check the bundle's files")
        opened = Bundle.open(bundle, trust=trust)
        full = None if whole is None else Bundle.open(whole, trust=trust)
        progress("run the artifact and compare")
        from dvexport.verify import verify as run_verify

        report = run_verify(
            opened, clip=clip, inputs=inputs, checkpoint=checkpoint, model=model, settings=options, whole=full
        )
    if as_json:
        print_json(report.to_dict())
    else:
        rows = [(name, _text(value), _text(limit), "ok" if ok else "FAILED") for name, value, limit, ok in report.rows]
        print_table(("check", "value", "limit", ""), rows, right=("value", "limit"))
        _print_seen(report.gates)
        for note in report.notes:
            print_lines(f"note: {note}")
    if not report.ok:
        failed = [name for name, _, _, ok in report.rows if not ok]
        raise CheckFailed(f"{len(failed)} of {len(report.rows)} checks failed", where=", ".join(failed))


def _print_seen(gates: Sequence[GateSeen]) -> None:
    """Print in how many frames each gate did what, and what no comparison has seen of it."""
    from dvexport.run.seen import EVENTS, titles

    if not gates:
        return
    shown = [event for kind in EVENTS.values() for event in kind if any(event in gate.events for gate in gates)]
    rows = [
        (gate.gate, *(_frames(gate, event) for event in shown), ", ".join(titles(gate.missing)) or "-")
        for gate in gates
    ]
    click.echo()
    click.echo("frames of the clip + forced frames in which a gate did this")
    print_table(("gate", *titles(shown), "never seen"), rows, right=titles(shown))


def _frames(gate: GateSeen, event: str) -> str:
    if event not in gate.events:
        return "-"
    clip, forced = gate.seen.clip, gate.seen.forced
    return f"{getattr(clip, event)}+{0 if forced is None else getattr(forced, event)}"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
