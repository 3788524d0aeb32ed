"""What was compiled and linked before, kept for the next time in a folder of the user's own.

What is read from here is executed later, so an entry carries a digest that is checked at every reading: what does not
match is made anew and replaced. The folder is used only where nobody else can have written to it. The cache saves
time and nothing else depends on it: what is wrong with it is said once, and costs time.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dvexport.own_folder import PRIVATE, make_private, refusal
from dvexport.targets.tvm.build.cache_files import (
    Entry,
    entry_name,
    list_entries,
    list_leftovers,
    list_older,
    read_entry,
    remove_emptied,
    remove_entry,
    write_entry,
)

__all__ = [
    "KEPT_BYTES", "KEPT_DAYS", "VARIABLE", "cache_folder", "cached", "clear", "entries", "keep", "keep_entry",
    "kept", "trouble", "usable_folder",
]  # fmt: skip

VARIABLE = "DVEXPORT_CACHE"
"""Names the folder of the cache."""

KEPT_DAYS = 90
"""An entry that was not read for longer is removed."""

KEPT_BYTES = 2 << 30
"""Above it, entries that were not read for the longest are removed."""

_FORMAT = "v2"
"""The folder of entries in the format of `cache_files.py`; the first format had none."""

_UNFINISHED_SECONDS = 3600
"""What is half written and older belongs to a process that was killed."""

_log = logging.getLogger("dvexport")
_said: set[str] = set()
_tidied: set[Path] = set()
_seen: dict[Path, tuple[int, ...]] = {}
"""What a folder of entries was when it was looked at: an export reads hundreds of entries."""


def cache_folder() -> Path | None:
    """Return where the cache is: `$DVEXPORT_CACHE`, `$XDG_CACHE_HOME/dvexport` or `~/.cache/dvexport`.

    None: neither variable is set, and there is no home folder.
    """
    if named := os.environ.get(VARIABLE):
        with suppress(OSError):  # the working folder was removed
            return Path(os.path.abspath(named))
        return None
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # a relative one is to be ignored, says its specification
        return Path(shared) / "dvexport"
    home = Path(os.path.expanduser("~"))
    return home / ".cache" / "dvexport" if home.is_absolute() and os.path.isdir(home) else None


def trouble() -> str | None:
    """Return why the cache is not used; None: it is."""
    folder = cache_folder()
    if folder is None:
        return "there is no home folder"
    try:
        return refusal(folder) or refusal(folder / _FORMAT)
    except OSError as error:
        return _cause(error)


def usable_folder() -> Path | None:
    """Return the folder of the entries, created when missing; None, and the reason said once, if it can't be used."""
    folder = cache_folder()
    if folder is not None and folder in _seen and _seen[folder] == _identity(folder / _FORMAT):
        return folder / _FORMAT
    why = trouble()
    if folder is not None and why is None:
        why = _made(folder / _FORMAT)
        if why is None:
            _seen[folder] = _identity(folder / _FORMAT)
            return folder / _FORMAT
    _say(f"the kernel cache is not used, which costs time and nothing else: {why}; ${VARIABLE} may name another folder")
    return None


def cached(kind: str, key: str, make: Callable[[], bytes]) -> bytes:
    """Return what is kept as `key`, or else what `make` returns, and keep that.

    Args:
        kind: one of `cache_files.KINDS`.
        key: 64 hexadecimal digits that stand for all that the content depends on.
        make: its errors are passed on, and nothing is kept.
    """
    data = kept(kind, key)
    if data is None:
        data = make()
        keep_entry(kind, key, data)
    return data


def kept(kind: str, key: str) -> bytes | None:
    """Return what is kept as `key`; see `cached`."""
    folder = usable_folder()
    return None if folder is None else read_entry(folder / entry_name(kind, key))


def keep_entry(kind: str, key: str, data: bytes) -> None:
    """Keep what was made; see `cached`."""
    folder = usable_folder()
    if folder is not None:
        path = folder / entry_name(kind, key)
        keep(lambda: write_entry(path, data))


def keep(write: Callable[[], None]) -> None:
    """Run what writes to the usable cache; if that fails it is said once."""
    try:
        write()
    except FileNotFoundError:
        return  # someone has just cleared the cache
    except OSError as error:
        # The name of an unfinished file, which tells nothing, would make every note another one.
        why = f"{error.strerror or error} (the cache is {cache_folder()})"
        _say(f"what was compiled can't be kept, so it will be compiled again: {why}")
    _tidy()


def entries() -> list[Entry]:
    """Return what the cache keeps; nothing where it is not used."""
    folder = cache_folder()
    return [] if folder is None or trouble() is not None else list(list_entries(folder / _FORMAT))


def clear() -> list[Entry]:
    """Remove every entry, those of older formats and unfinished ones included, and return them.

    What has any other name stays, and symbolic links do.

    Raises:
        OSError: one can't be removed; the others are gone.
    """
    folder = cache_folder()
    if folder is None or trouble() is not None:
        return []
    failed, removed = None, []
    for entry in [*entries(), *list_leftovers(folder / _FORMAT, 0), *_older(folder)]:
        try:
            remove_entry(entry.path)
            removed.append(entry)
        except OSError as error:
            failed = error
    remove_emptied(entry.path.parent for entry in removed)
    if failed is not None:
        raise failed
    return removed


def _tidy() -> None:
    """Remove what is old, or too much, once a process."""
    folder = cache_folder()
    if folder is None or folder in _tidied:
        return
    _tidied.add(folder)
    total, oldest = 0, time.time() - KEPT_DAYS * 86400
    with suppress(OSError):
        for entry in sorted(entries(), key=lambda entry: entry.used, reverse=True):
            total += entry.size
            if total > KEPT_BYTES or entry.used < oldest:
                remove_entry(entry.path)
        older = _older(folder)
        for entry in [*list_leftovers(folder / _FORMAT, _UNFINISHED_SECONDS), *older]:
            remove_entry(entry.path)
        remove_emptied(entry.path.parent for entry in older)


def _older(folder: Path) -> list[Entry]:
    """Return entries of older formats, as far as their folders are the user's."""
    return [entry for entry in list_older(folder) if refusal(entry.path.parent) is None]


def _made(folder: Path) -> str | None:
    """Create the folder of the entries when missing; return why it can't be used."""
    try:
        make_private(folder)
        with suppress(OSError):  # a file system for reading only: others may read it, no more
            folder.chmod(PRIVATE)
    except OSError as error:
        return _cause(error)
    return trouble()  # some file systems know no owners


def _identity(folder: Path) -> tuple[int, ...]:
    try:
        info = folder.lstat()
    except OSError:
        return ()
    return info.st_dev, info.st_ino, info.st_mode, info.st_uid


def _cause(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"


def _say(text: str) -> None:
    if text not in _said:
        _said.add(text)
        _log.warning("note: %s", text)
