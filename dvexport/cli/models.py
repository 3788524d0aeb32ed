"""`dvexport models`: what can be exported, and whether the definitions match what was published."""

from __future__ import annotations

import click

from dvexport.cli.options import json_flag
from dvexport.cli.output import checklist, print_fields, print_json, print_table

__all__ = ["models"]


@click.command()
@click.argument("name", required=False)
@click.option("--figures", is_flag=True, help="Recompute published figures; exit 1 if one is off.")
@json_flag
def models(name: str | None, figures: bool, as_json: bool) -> None:
    """List the models of the zoo, or the options of one."""
    if figures:
        _figures(as_json)
    elif name is not None:
        _one(name, as_json)
    else:
        _all(as_json)


def _all(as_json: bool) -> None:
    from dvexport.models import zoo

    infos = [zoo.describe(name) for name in zoo.names()]
    if as_json:
        print_json([_plain(info) for info in infos])
        return
    rows = [(info.name, "yes" if info.weights else "no", info.summary) for info in infos]
    print_table(("model", "trained", "what it is"), rows)


def _one(name: str, as_json: bool) -> None:
    from dvexport.models import zoo
    from dvexport.models.checkpoints.families import FAMILIES
    from dvexport.models.option_help import option_help

    info = zoo.describe(name)
    if as_json:
        print_json(_plain(info))
        return
    print_fields([("model", info.name), ("what it is", info.summary), ("family", info.family)])
    click.echo()
    options = option_help(FAMILIES[info.family].config, info.options)
    rows = [(one.name, one.value or "(none)", "|".join(one.choices), one.text.replace("`", "")) for one in options]
    print_table(("option", "value", "choices", "what it is"), rows)
    frames = next(one for one in options if one.name == "frames")
    click.echo(f"\nto change one: dvexport export {name} --set {frames.name}={frames.value} ...")


def _plain(info: object) -> dict[str, object]:
    """Return a `ModelInfo` as JSON has it."""
    import dataclasses

    assert dataclasses.is_dataclass(info)
    assert not isinstance(info, type)
    values = dataclasses.asdict(info)
    return {**values, "weights": values["weights"] is not None}


def _figures(as_json: bool) -> None:
    from dvexport.errors import CheckFailed
    from dvexport.models import figures as published

    with checklist() as progress:
        progress("recompute the published figures")
        found = published.figures()
    header, *rows = published.table(found)
    if as_json:
        keys = ("name", "computed", "published", "difference", "ok", "explanation")
        print_json([{**dict(zip(keys, row, strict=True)), "ok": f.ok} for row, f in zip(rows, found, strict=True)])
    else:
        print_table(header, rows, right=("computed", "published", "difference"))
    wrong = [figure.name for figure in found if not figure.ok]
    if wrong:
        raise CheckFailed(f"{len(wrong)} of {len(found)} figures are off", where=", ".join(wrong))
