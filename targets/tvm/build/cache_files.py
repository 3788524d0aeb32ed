"""The files of a cache folder: entries with a digest of their content, and what is removed in time.

An entry is a file `KIND-KEY`; a folder `KIND-KEY.d` beside it belongs to it, if its content is a list of digests
(`libraries.py`). What has another name is not ours, and stays.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "KINDS", "Entry", "entry_name", "list_entries", "list_leftovers", "list_older", "read_entry",
    "remove_emptied", "remove_entry", "tree_files", "tree_of", "unfinished_of", "write_entry",
]  # fmt: skip

KINDS = ("kernel", "library", "android", "runner", "zig")
"""Objects of kernels; libraries for Linux and for Android; runners; what `libraries.py` keeps of the compiler."""

_OLDER = (("kernels", re.compile(r"[0-9a-f]{64}\.o")), ("linked", re.compile(r"[0-9a-f]{64}")))
"""Folders of the first format, and the names of its files."""

_NAME = re.compile(rf"(?P<kind>{'|'.join(KINDS)})-[0-9a-f]{{64}}")
_UNFINISHED = re.compile(rf"\.{_NAME.pattern}\.[0-9a-f]{{16}}")
_TREE = ".d"

_HEAD = struct.Struct("<16sQ32s")
_MAGIC = b"dvexport cache 2"

_MOST_BYTES = 1 << 30
"""What is larger is no entry, and not read: whole libraries have some megabytes."""

_USED_WITHIN = 86400
"""Seconds between two times that an entry is marked as used: a write for each reading would be too many."""


@dataclass(frozen=True)
class Entry:
    """A thing that the cache keeps.

    Attributes:
        path: its file, or what that would be called where only its folder is left.
        kind: one of `KINDS`, `older` (of an older format) or `unfinished`.
        size: bytes, its folder's included.
        used: when it was last read, in seconds since 1970, to a day.
    """

    path: Path
    kind: str
    size: int
    used: float


def entry_name(kind: str, key: str) -> str:
    """Return the name of an entry's file; `key` has 64 hexadecimal digits."""
    name = f"{kind}-{key}"
    assert _NAME.fullmatch(name), name
    return name


def read_entry(path: Path) -> bytes | None:
    """Return the content of an entry; None unless it is a file of the user's, and as it was written."""
    try:
        # A pipe or a device by that name is neither read nor waited for.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as stream:
            info = os.fstat(handle)
            if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
                return None
            head = stream.read(_HEAD.size)
            if len(head) < _HEAD.size:
                return None
            magic, size, digest = _HEAD.unpack(head)
            if magic != _MAGIC or info.st_size != _HEAD.size + size or size > _MOST_BYTES:
                return None
            data = stream.read()
    except OSError:
        return None
    if _digest(path.name, data) != digest:
        return None
    if info.st_mtime < time.time() - _USED_WITHIN:
        with suppress(OSError):
            os.utime(path)
    return data


def write_entry(path: Path, data: bytes) -> None:
    """Write an entry whole or not at all; OSError if it can't be written.

    It is not flushed to the disk: what a crash leaves does not match its digest, and hundreds of flushes take longer
    than compiling.
    """
    temporary = unfinished_of(path)
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(handle, "wb") as stream:
            stream.write(_HEAD.pack(_MAGIC, len(data), _digest(path.name, data)))
            stream.write(data)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def unfinished_of(path: Path) -> Path:
    """Return a new name for an entry while it is being written."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def tree_of(path: Path) -> Path:
    """Return the folder that belongs to an entry."""
    return path.with_name(path.name + _TREE)


def tree_files(folder: Path) -> Iterator[Path]:
    """Yield all files of a folder, which may be missing; symbolic links are not followed."""
    for at, _, names in os.walk(folder):
        for name in names:
            yield Path(at) / name


def list_entries(folder: Path) -> Iterator[Entry]:
    """Yield the entries in `folder`, by name."""
    for path, info in _listed(folder, stat.S_ISREG):
        if match := _NAME.fullmatch(path.name):
            yield Entry(path, match["kind"], info.st_size + _tree_size(path), info.st_mtime)


def list_leftovers(folder: Path, seconds: float) -> Iterator[Entry]:
    """Yield what a killed process left in `folder` more than `seconds` ago, which nothing will ever read."""
    for path, info in _listed(folder, stat.S_ISREG):
        if _UNFINISHED.fullmatch(path.name) and info.st_mtime <= time.time() - seconds:
            yield Entry(path, "unfinished", info.st_size, info.st_mtime)
    for path, info in _listed(folder, stat.S_ISDIR):
        entry = path.with_name(path.name.removesuffix(_TREE))
        lost = _UNFINISHED.fullmatch(entry.name) or (_NAME.fullmatch(entry.name) and not os.path.lexists(entry))
        if lost and path != entry and info.st_mtime <= time.time() - seconds:
            yield Entry(entry, "unfinished", _tree_size(entry), info.st_mtime)


def list_older(folder: Path) -> Iterator[Entry]:
    """Yield what older formats kept in `folder`, the cache's own."""
    for name, pattern in _OLDER:
        for path, info in _listed(folder / name, stat.S_ISREG):
            if pattern.fullmatch(path.name):
                yield Entry(path, "older", info.st_size, info.st_mtime)


def remove_entry(path: Path) -> None:
    """Remove an entry and the folder that belongs to it; OSError if that can't be done, unless it is gone."""
    with suppress(FileNotFoundError):
        path.unlink()
    tree = tree_of(path)
    if tree.is_dir() and not tree.is_symlink():
        shutil.rmtree(tree)


def remove_emptied(folders: Iterable[Path]) -> None:
    """Remove the folders of older formats that entries were removed from, where they are empty now."""
    for folder in set(folders):
        with suppress(OSError):
            folder.rmdir()


def _listed(folder: Path, wanted: Callable[[int], bool]) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield what a folder holds of one kind; nothing where it is missing or a symbolic link."""
    try:
        names = [] if folder.is_symlink() else sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        with suppress(FileNotFoundError):
            info = (folder / name).lstat()
            if wanted(info.st_mode):
                yield folder / name, info


def _tree_size(path: Path) -> int:
    total = 0
    for file in tree_files(tree_of(path)):
        with suppress(OSError):
            total += file.lstat().st_size
    return total


def _digest(name: str, data: bytes) -> bytes:
    """The name is part of it: an entry under another's name does not match."""
    digest = hashlib.sha256(name.encode() + b"\0")
    digest.update(data)
    return digest.digest()
