"""Option types that several commands share, with errors that quote what was given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from dvexport.errors import UsageError, unknown_name

__all__ = [
    "Seconds",
    "bundle_argument",
    "inputs_option",
    "json_flag",
    "parse_choice",
    "parse_force",
    "parse_pairs",
    "path_option",
    "plain_path",
    "threads_option",
    "trust_flag",
]


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Seconds(click.FloatRange):
    """A duration from 0 to an hour; what is no number is none."""

    def __init__(self) -> None:
        super().__init__(min=0, max=3600)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the seconds; click's own range lets NaN through."""
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value} is no number of seconds.", param, ctx)
        return seconds


plain_path = click.Path(path_type=Path)
"""A path; whether it exists is for the command to say, in dvexport's own words."""

bundle_argument = click.argument("bundle", metavar="BUNDLE.dvx", type=plain_path)
trust_flag = click.option(
    "--trust",
    is_flag=True,
    help="Run the bundle's native code though you did not make it here. It is a program: only if you trust its maker.",
)
json_flag = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
threads_option = click.option(
    "--threads", default=1, show_default=True, type=int, help="Threads of the runtime, as many as the bundle takes."
)


inputs_option = click.option(
    "--inputs",
    type=plain_path,
    help="An .npz file with the model's inputs beside the video: arrays by name, one row a frame.",
)


def path_option(*names: str, help: str, required: bool = False) -> Decorator:
    """Return an option that takes a path."""
    return click.option(*names, type=plain_path, help=help, required=required)


def parse_pairs(option: str, texts: Iterable[str], hint: str | None = None) -> dict[str, str]:
    """Return `KEY=VALUE` texts as a dict; `hint` goes into the error for what is none.

    Raises:
        UsageError: one has no `=` or no key, or a key is given twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"{option} takes KEY=VALUE", where=f"{option} {text}", hint=hint)
        if key in pairs:
            raise UsageError(f"{option} gives '{key}' twice", where=f"{pairs[key]} and {value.strip()}")
        pairs[key] = value.strip()
    return pairs


def parse_force(text: str) -> dict[str, float]:
    """Return rates such as `channels=0.5,tiles=0.25`, each from 0 to 1, as a dict.

    Raises:
        UsageError: an unknown kind, no number, or one outside 0..1.
    """
    from dvexport.decisions import OVER

    rates = {}
    for kind, value in parse_pairs("--force", filter(None, text.split(","))).items():
        if kind not in OVER:
            raise unknown_name("kind of decision", kind, OVER)
        rates[kind] = _rate(kind, value)
    if not rates:
        raise UsageError("--force needs at least one rate", hint="--force channels=0.5,tiles=0.5")
    return rates


def _rate(kind: str, value: str) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1:
        raise UsageError(f"--force takes rates from 0 to 1, not '{value}'", where=f"--force {kind}={value}")
    return rate


def parse_choice(kind: str, known: Iterable[str], default: str | None, otherwise: str = "") -> Decorator:
    """Return an option `--KIND` with one of the values `known`; another one raises, with the nearest.

    Args:
        otherwise: what holds where there is no default, for the help.
    """
    known = tuple(known)

    def check(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
        if value is not None and value not in known:
            raise unknown_name(kind, value, known)
        return value

    return click.option(
        f"--{kind}",
        default=default,
        show_default=default is not None,
        metavar=f"[{'|'.join(known)}]",
        callback=check,
        help=f"{kind.capitalize()} to export for{otherwise}.",
    )
