"""What commands print: tables, JSON, and progress that is a checklist on a terminal, lines in a pipe.

Results go to the standard output, progress to the standard error.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import click

from dvexport.names import printable

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["checklist", "file_size", "print_fields", "print_json", "print_lines", "print_table", "printable_lines"]

PIPED_WIDTH = 200
"""Wide enough that no row of a table wraps where a script reads it."""


def print_json(data: Any) -> None:
    """Print `data` as JSON."""
    click.echo(json.dumps(data, indent=1, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print a table without borders; the columns named in `right` are aligned to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    _print(table)


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Print names and values, the values aligned."""
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        click.echo(f"{click.style(name.ljust(width), bold=True)}  {printable(value)}")


def print_lines(*lines: str) -> None:
    """Print lines."""
    for line in lines:
        click.echo(printable_lines(line))


def printable_lines(text: str) -> str:
    """Return a text of several lines, each as `names.printable`."""
    return "\n".join(map(printable, text.split("\n")))


def file_size(count: int) -> str:
    """Return a number of bytes in the largest unit that keeps it above 1."""
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024 or unit == "GiB":
            return f"{size:.1f} {unit}"
    raise AssertionError("unreachable")


def _print(table: Table) -> None:
    from rich.console import Console

    if sys.stdout.isatty():
        Console().print(table)
        return
    plain = Console(width=PIPED_WIDTH, color_system=None)
    with plain.capture() as text:
        plain.print(table)
    print_lines(*(line.rstrip() for line in text.get().splitlines()))


@contextmanager
def checklist(verbose: bool = False) -> Iterator[Callable[[str], None]]:
    """Yield the progress callback of a long command: each call begins a step and ends the one before.

    A text such as "compile kernels: 12 of 60, NAME" is a step that goes on. What follows the comma is shown if
    `verbose`.
    """
    steps: _Steps = _TerminalSteps() if sys.stderr.isatty() else _PipedSteps()

    def tell(text: str) -> None:
        counted = _COUNTED.fullmatch(text)
        if counted is None:
            steps.begin(text)
            return
        step, count, name = counted.groups()
        steps.go_on(step, count, name if verbose and name else "")

    try:
        yield tell
    except BaseException:
        steps.end("✗")
        raise
    steps.end("✓")


_COUNTED = re.compile(r"(.+): (\d+ of \d+)(?:, (.+))?")

_SECONDS = 10.0
"""Between two lines of one step where no line can be written over."""


class _Steps(Protocol):
    def begin(self, text: str) -> None:
        """Begin a step, and end the one before."""

    def go_on(self, text: str, count: str, name: str) -> None:
        """Say how far a step is, which begins if it is another one; `name`, if told, is what was done last."""

    def end(self, mark: str) -> None:
        """End the step."""


class _PipedSteps:
    """One line a step; one that goes on says how far it is now and then, or each time where it names what was done."""

    def __init__(self) -> None:
        self._step, self._told, self._left = "", 0.0, ""

    def begin(self, text: str) -> None:
        self.end("")
        self._step = text
        click.echo(text, err=True)

    def go_on(self, text: str, count: str, name: str) -> None:
        now = time.monotonic()
        if text != self._step:
            self.end("")
            self._step = text
        elif not name and now < self._told + _SECONDS:
            self._left = count
            return
        self._told, self._left = now, ""
        click.echo(f"{text}: {count}  {name}".rstrip(), err=True)

    def end(self, _mark: str) -> None:
        if self._left:
            click.echo(f"{self._step}: {self._left}", err=True)
            self._left = ""


class _TerminalSteps:
    """A spinner at the running step; a mark and the seconds it took before each that is over."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._status: Any = None
        self._text = self._step = ""
        self._start = 0.0

    def begin(self, text: str) -> None:
        from rich.markup import escape

        self.end("✓")
        self._text, self._step, self._start = escape(text), text, time.perf_counter()
        self._status = self._console.status(self._text)
        self._status.start()

    def go_on(self, text: str, count: str, name: str) -> None:
        from rich.markup import escape

        if text != self._step or self._status is None:
            self.begin(text)
        self._text = escape(f"{text}: {count}")
        self._status.update(self._text)
        if name:
            self._console.print(f"  [dim]{escape(name)}[/]")

    def end(self, mark: str) -> None:
        if self._status is None:
            return
        self._status.stop()
        self._status = None
        colour = "green" if mark == "✓" else "red"
        seconds = time.perf_counter() - self._start
        self._console.print(f"[{colour}]{mark}[/] {self._text} [dim]{seconds:.1f} s[/]")
