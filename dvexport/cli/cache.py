"""`dvexport cache`: where compiled kernels are kept, and how to be rid of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from dvexport.cli.options import json_flag
from dvexport.cli.output import file_size, print_fields, print_json, print_lines
from dvexport.errors import DeviceError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dvexport.targets.tvm.build.cache_files import Entry

__all__ = ["cache"]

_ACTIONS = ("clear",)


@click.command()
@click.argument("action", required=False, metavar="[clear]")
@json_flag
def cache(action: str | None, as_json: bool) -> None:
    """Show where compiled kernels are kept for the next export, and how much they take.

    `clear` removes them, and nothing else: the next export compiles them again.
    """
    if action is not None and action not in _ACTIONS:
        raise unknown_name("action", action, _ACTIONS)
    from dvexport.targets.tvm.build import cache as kept

    if action == "clear":
        _clear(as_json)
        return
    folder, why, entries = kept.cache_folder(), kept.trouble(), kept.entries()
    if as_json:
        print_json({"folder": folder and str(folder), "trouble": why, **_as_json(entries)})
        return
    size = file_size(sum(entry.size for entry in entries))
    rows = [("folder", str(folder or "none")), ("entries", _counts(entries)), ("size", size)]
    if entries:
        rows.append(("oldest use", time.strftime("%Y-%m-%d", time.localtime(min(entry.used for entry in entries)))))
    rows.append(("kept", f"{kept.KEPT_DAYS} days after the last use, {file_size(kept.KEPT_BYTES)} at most"))
    if why is not None:
        rows.append(("not used", why))
    print_fields([*rows, ("set by", f"${kept.VARIABLE}, otherwise in the user's cache folder")])


def _clear(as_json: bool) -> None:
    from dvexport.targets.tvm.build import cache as kept

    folder, why = kept.cache_folder(), kept.trouble()
    if why is not None:
        hint = f"remove it yourself, or name another folder with {kept.VARIABLE}"
        raise DeviceError(
            "the kernel cache is not used, so nothing is removed", where=_text(folder), why=why, hint=hint
        )
    try:
        removed = kept.clear()
    except OSError as error:
        raise DeviceError(
            "the kernel cache can't be cleared whole",
            where=error.filename or _text(folder),
            why=error.strerror or str(error),
        ) from error
    if as_json:
        print_json({"folder": _text(folder), **_as_json(removed)})
        return
    print_lines(f"removed {len(removed)} entries, {file_size(sum(entry.size for entry in removed))}, from {folder}")


def _as_json(entries: Sequence[Entry]) -> dict[str, object]:
    kinds = {
        kind: [entry for entry in entries if entry.kind == kind] for kind in dict.fromkeys(e.kind for e in entries)
    }
    return {
        "entries": len(entries),
        "bytes": sum(entry.size for entry in entries),
        "kinds": {
            kind: {"entries": len(of_kind), "bytes": sum(entry.size for entry in of_kind)}
            for kind, of_kind in kinds.items()
        },
    }


def _counts(entries: Sequence[Entry]) -> str:
    kinds = [entry.kind for entry in entries]
    each = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return f"{len(entries)} ({each})" if entries else "0"


def _text(folder: object) -> str:
    return str(folder or "no folder")
