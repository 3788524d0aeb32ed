"""Whether native code of a bundle may be loaded here: it is a program, and does what whoever made it wants.

Code that this user exported on this machine runs. A list of the user's remembers this code. The list is a folder
outside every bundle, so that bundles stay the same byte for byte. It holds an empty file for each digest of a native
artifact (library, plans, weights and all else under `native/`). All other code needs `Bundle.open(path, trust=True)`,
`--trust` on the command line.

The list is believed only where nobody else can have written it. One that can't be written costs nothing but that
flag.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dvexport.errors import BundleError
from dvexport.own_folder import refusal

if TYPE_CHECKING:
    from dvexport.bundle.archive import Bundle
    from dvexport.bundle.manifest import Manifest

__all__ = ["CODE", "check_trust", "code_digest", "exports_folder", "has_code", "made_here", "remember"]

CODE = "native/"
"""What the names of all files begin with that a native artifact consists of."""

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def has_code(manifest: Manifest) -> bool:
    """Return whether a bundle holds native code."""
    return any(name.startswith(CODE) for name in manifest.files)


def code_digest(manifest: Manifest) -> str:
    """Return the SHA-256 over names, sizes and digests of a bundle's native artifact, in hexadecimal."""
    files = sorted((name, entry.size, entry.sha256) for name, entry in manifest.files.items() if name.startswith(CODE))
    return hashlib.sha256("".join(f"{sha256} {size} {name}\n" for name, size, sha256 in files).encode()).hexdigest()


def exports_folder() -> Path | None:
    """Return where the user's own exports are remembered, which need not exist.

    `$DVEXPORT_STATE`, else `dvexport` in the user's folder of state. None where there is no such folder; a relative
    path is none, as it would be another one in every working folder, a stranger's too.
    """
    state = os.environ.get("DVEXPORT_STATE")
    if not state:
        base = os.environ.get("XDG_STATE_HOME", "")
        if not os.path.isabs(base):
            try:
                base = str(Path.home() / ".local" / "state")
            except RuntimeError:
                return None
        state = os.path.join(base, "dvexport")
    return Path(state) / "exports" if os.path.isabs(state) else None


def remember(manifest: Manifest) -> bool:
    """Note that this user made a bundle's native code here; False if the list can't be written or believed."""
    folder = exports_folder()
    if folder is None:
        return False
    with suppress(OSError):
        for new in (folder.parent, folder):
            new.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_believed(folder):
            path = folder / code_digest(manifest)
            with suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            return made_here(manifest)
    return False


def made_here(manifest: Manifest) -> bool:
    """Return whether this user exported a bundle's native code on this machine."""
    folder = exports_folder()
    if folder is None or not has_code(manifest):
        return False
    return _is_believed(folder) and _is_ours(folder / code_digest(manifest), stat.S_ISREG)


def check_trust(bundle: Bundle) -> None:
    """Raise BundleError unless the native code of a bundle may be loaded."""
    if bundle.trust or made_here(bundle.manifest):
        return
    raise BundleError(
        "the bundle holds native code, which was not made on this machine by you; it was not loaded",
        where=str(bundle.path),
        why="native code is a program: it can do whatever you can",
        hint="if you trust whoever made it: --trust, or in Python Bundle.open(path, trust=True)",
    )


def _is_believed(folder: Path) -> bool:
    """Return whether nobody else can have written the list in `folder`, or put another folder of ours in its place."""
    try:
        return _is_ours(folder, stat.S_ISDIR) and refusal(folder) is None
    except OSError:
        return False


def _is_ours(path: Path, kind: object) -> bool:
    """Return whether `path`, itself and no link, is of this user and not to be written by others."""
    try:
        found = path.lstat()
    except OSError:
        return False
    if not hasattr(os, "geteuid"):  # no such rights there, and no native code either
        return False
    assert callable(kind)
    return bool(kind(found.st_mode)) and found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE
