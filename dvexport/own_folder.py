"""A folder that nobody but the user can have written to: what is read from it and then executed is the user's own."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["PRIVATE", "make_private", "refusal"]

PRIVATE = 0o700
"""Mode of folders made here."""

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MOST_LINKS = 40
"""Symbolic links on the way to a folder, as many as Linux follows."""


def refusal(folder: Path) -> str | None:
    """Return why others may have written to `folder`, or could put another in its place; None: they can't.

    The folder must be the user's, and every folder and symbolic link on the way to it the user's or root's. None may
    be writable by the group or by everybody, but for those on the way where only owners rename (`/tmp`). What is
    missing is nobody's yet.

    Args:
        folder: absolute.

    Raises:
        OSError: a part of the path can't be looked at.
    """
    for at in _way(folder):
        try:
            info = at.lstat()
        except FileNotFoundError:
            return None
        last = at == folder
        if info.st_uid != os.geteuid() and (last or info.st_uid != 0):
            return f"{at} belongs to {_user(info.st_uid)}"
        if stat.S_ISLNK(info.st_mode):
            continue
        if not stat.S_ISDIR(info.st_mode):
            return f"{at} is no folder"
        if info.st_mode & _OTHERS_WRITE and (last or not info.st_mode & stat.S_ISVTX):
            return f"others may write to {at} (its mode is {stat.S_IMODE(info.st_mode):o}; chmod go-w makes it yours)"
    return None


def make_private(folder: Path) -> None:
    """Create `folder` and what is missing on the way to it, for the user alone; OSError if that can't be done."""
    missing = []
    for at in (folder, *folder.parents):
        if at.exists():
            break
        missing.append(at)
    for at in reversed(missing):
        with suppress(FileExistsError):  # by another process, just now
            at.mkdir(PRIVATE)


def _way(folder: Path) -> Iterator[Path]:
    """Yield every folder and symbolic link from the root to `folder`, which is the last unless it is a link itself."""
    at, links = Path(folder.anchor), 0
    rest = list(reversed(folder.parts[1:]))
    yield at
    while rest:
        name = rest.pop()
        if name == "..":
            at = at.parent
            continue
        step = at / name
        yield step
        if not step.is_symlink():
            at = step
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(f"too many symbolic links at {step}")
        target = Path(os.readlink(step))
        if target.is_absolute():
            at = Path(target.anchor)
        rest += reversed(target.parts[1:] if target.is_absolute() else target.parts)


def _user(number: int) -> str:
    import pwd

    try:
        return f"the user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"the user {number}"
