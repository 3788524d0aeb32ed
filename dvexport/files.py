"""Write an output file whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dvexport.errors import UsageError

__all__ = ["atomic_write", "writable_output"]

_CAUSES = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another place"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another place"),
    errno.EFBIG: ("the file is larger than this file system allows", "choose another place"),
    errno.EACCES: ("the folder is not writable", "choose a folder you may write to"),
    errno.EPERM: ("the folder is not writable", "choose a folder you may write to"),
    errno.EROFS: ("the file system is read-only", "choose a folder you may write to"),
    errno.ENOENT: ("the folder does not exist", "create it first"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another place"),
    errno.EISDIR: ("it is a folder", "name a file"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter name"),
}


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` when the block ends without an error.

    The content is flushed to the disk before the rename, so a crash leaves the old file or the new
    one, never a part. On any exception, interrupts included, the temporary file is removed.

    Raises:
        UsageError: the folder is missing or not writable, the disk is full, `path` is a folder.
    """
    path = Path(path)
    temporary = _reserve(path)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        # An error about some other file, one that the block reads, is not ours to explain.
        if error.filename not in (None, str(temporary), str(path)):
            raise
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def writable_output(path: str | Path) -> Path:
    """Return `path` after checking that it can be written, so that long work is not done in vain.

    Raises:
        UsageError: as `atomic_write`.
    """
    path = Path(path)
    _reserve(path).unlink()
    return path


def _reserve(path: Path) -> Path:
    """Create an empty file beside `path`; the suffix is kept, since writers choose a format by it."""
    temporary = path.parent / f".{path.stem[:32]}.{secrets.token_hex(4)}{path.suffix}"
    try:
        if path.is_dir() or not path.name:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise _cannot_write(path, error) from error
    return temporary


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(path: Path, error: OSError) -> UsageError:
    why, hint = _CAUSES.get(error.errno or 0, (error.strerror or str(error), "choose another place"))
    return UsageError(f"cannot write {path.name or path}", where=str(path.absolute().parent), why=why, hint=hint)
