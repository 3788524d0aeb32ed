"""The command line: one file a command, every heavy import inside the command that needs it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import click

from dvexport.cli.cache import cache
from dvexport.cli.checkpoint import checkpoint
from dvexport.cli.export import export
from dvexport.cli.inspect import inspect
from dvexport.cli.models import models
from dvexport.cli.output import printable_lines
from dvexport.cli.profile import profile
from dvexport.cli.run import run
from dvexport.cli.slim import slim
from dvexport.cli.targets import targets
from dvexport.cli.train import train
from dvexport.cli.tune import tune
from dvexport.cli.unpack import unpack
from dvexport.cli.verify import verify
from dvexport.errors import DeviceError, DvexportError, unknown_name

__all__ = ["cli", "main"]

_INTERRUPTED = 130
"""What shells report for a program that was interrupted (128 + SIGINT)."""


class _Group(click.Group):
    """Keeps the commands in the order of the work, and suggests the nearest for an unknown one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise unknown_name("command", args[0], self.commands)
        return super().resolve_command(ctx, args)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="dvexport")
def cli() -> None:
    """Export trained dynamic video models so that the work their gates skip is really skipped.

    Exit codes: 0 done, 1 a check failed, 2 wrong use or bad input, 3 device or environment.
    """


for _command in (models, targets, checkpoint, export, inspect, verify, run, profile, slim, unpack, tune, train, cache):
    cli.add_command(_command)


def main(args: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code; a user's mistake gives one message, no traceback."""
    with _interrupts() as interrupted:
        code = _exit_code(args, interrupted)
    sys.exit(code)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Yield what tells whether an interrupt has arrived: what libraries make of one may be any other error."""
    arrived = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal arrived
        arrived = True
        signal.default_int_handler(number, frame)

    # Elsewhere than in the main thread, and where somebody else listens, this is not ours to do.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ours = ours and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: arrived
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit_code(args: list[str] | None, interrupted: Callable[[], bool]) -> int:
    if sys.stdout is None or sys.stderr is None:  # the shell's >&-
        closed, sys.stdout = sys.stdout is None, sys.stdout or sys.stderr
        sys.stderr = sys.stderr or sys.stdout
        return _report("standard output is closed", DeviceError.exit_code) if closed else DeviceError.exit_code
    try:
        code = int(cli.main(args=args, prog_name="dvexport", standalone_mode=False) or 0)
        sys.stdout.flush()
        return code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.NoSuchOption as error:
        return _report(f"{error.format_message()}{_as_setting(error.option_name)}", error.exit_code)
    except click.ClickException as error:
        return _report(error.format_message(), error.exit_code)
    except DvexportError as error:
        return _report("interrupted", _INTERRUPTED) if interrupted() else _report(str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _report("interrupted", _INTERRUPTED)
    except BrokenPipeError:
        # The reader, such as `head`, has what it wants.
        _drop_output()
        return 0
    except OSError as error:
        _drop_output()
        where = f" ({error.filename})" if error.filename else ""
        return _report(f"{error.strerror or error}{where}", DeviceError.exit_code)


def _as_setting(option: str) -> str:
    """Return what to do about an option that is one of a model, such as official code's --shift; nothing for others."""
    from dvexport.models.checkpoints.families import FAMILIES
    from dvexport.models.settings import OFFICIAL_NAMES, option_names

    name = option.lstrip("-").replace("-", "_")
    name = OFFICIAL_NAMES.get(name, name)
    known = {each for family in FAMILIES.values() for each in option_names(family.config)}
    return f"\n  try: it is an option of the model: --set {name}=..." if name.replace(".", "_") in known else ""


def _drop_output() -> None:
    """Keep Python from writing to standard output, which failed, once more at exit."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(message: str, exit_code: int) -> int:
    click.echo(f"{click.style('error:', fg='red', bold=True)} {printable_lines(message)}", err=True)
    return exit_code
