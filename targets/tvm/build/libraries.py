"""What the compiler of the `ziglang` package builds once for each target: a C library to link with, and its start code.

The compiler keeps that in a cache of its own and links whatever lies there. Here a cache is a folder of ours beside an
entry with the digest of every file in it, and is used only while all match; else the libraries are built again, in half
a minute. The compiler's other files are in folders that go with the link.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from dvexport.errors import DeviceError
from dvexport.targets.tvm.build.cache import keep, usable_folder
from dvexport.targets.tvm.build.cache_files import (
    entry_name,
    read_entry,
    remove_entry,
    tree_files,
    tree_of,
    unfinished_of,
    write_entry,
)

__all__ = ["compiler_environment", "has_libraries", "with_libraries"]

_SHARED, _OWN = ".libraries", ".cache"
"""In a link's folder: what this module keeps, or a link to it; what is of this link alone."""

_KEPT = ("b", "h", "o")
"""Folders of the compiler's cache that matter for the next time: sources that it wrote, lists of inputs, outputs."""


def compiler_environment(folder: Path) -> dict[str, str]:
    """Return the variables that a compiler in a link's folder runs with."""
    own = {"ZIG_GLOBAL_CACHE_DIR": str(folder / _SHARED), "ZIG_LOCAL_CACHE_DIR": str(folder / _OWN)}
    return {**os.environ, **own, "ZERO_AR_DATE": "1"}


def with_libraries(key: str, folder: Path, link: Callable[[], None]) -> None:
    """Run `link`, whose compilers run in `folder`, with the libraries that are kept as `key`; or else keep them.

    Args:
        key: 64 hexadecimal digits that stand for the compiler, its target and its options.

    Raises:
        DeviceError: whatever `link` raises.
    """
    kept, shared = usable_folder(), folder / _SHARED
    if kept is None:
        link()
        return
    entry = kept / entry_name("zig", key)
    if _is_whole(entry):
        shared.symlink_to(tree_of(entry))
        try:
            link()
        except DeviceError:
            if _is_whole(entry):  # nobody removed it meanwhile
                raise
            shared.unlink()
            link()
        return
    link()
    keep(lambda: _keep(entry, shared))


def has_libraries(key: str) -> bool:
    """Return whether the libraries are kept as `key`, or can't be kept at all."""
    kept = usable_folder()
    return kept is None or _is_whole(kept / entry_name("zig", key))


def _is_whole(entry: Path) -> bool:
    """Whether the folder of an entry can be written, as the compiler asks, and holds just what it did."""
    listed = read_entry(entry)
    return listed is not None and os.access(tree_of(entry), os.W_OK) and listed == _digests(tree_of(entry))


def _digests(tree: Path) -> bytes | None:
    """Return the digests of a cache's files; None if one can't be read."""
    found = {}
    try:
        for path in sorted(file for name in _KEPT for file in tree_files(tree / name)):
            if path.is_symlink() or not path.is_file():
                return None
            found[str(path.relative_to(tree))] = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
    return json.dumps(found).encode()


def _keep(entry: Path, shared: Path) -> None:
    """Copy a cache into the folder of an entry, in place of a damaged one; the first of two processes stays."""
    unfinished = unfinished_of(entry)
    try:
        for name in _KEPT:
            shutil.copytree(shared / name, tree_of(unfinished) / name)
        digests = _digests(tree_of(unfinished))
        if digests is None or _is_whole(entry):
            return
        remove_entry(entry)
        try:
            os.rename(tree_of(unfinished), tree_of(entry))
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return  # another process was faster just now
            raise
        write_entry(entry, digests)
    finally:
        remove_entry(unfinished)
