"""Write an output file whole or not at all; into a device or a pipe, what it takes, in one go."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dvexport.errors import UsageError

__all__ = ["atomic_write", "check_file", "new_folder", "read_text", "writable_output"]

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
    errno.ELOOP: ("it is a link that leads back to itself", "name a file"),
    errno.EPIPE: ("whoever read from it has gone", "start the reader first, or name a file"),
}

_LONGEST_SUFFIX = 16
"""Bytes; no format that a writer knows has more, and the temporary file's name has to stay legal."""


MOST_TEXT = 16 << 20
"""Bytes of a text that somebody wrote: labels, a target, a recipe, a config."""


def check_file(path: str | Path) -> None:
    """Raise OSError for what is read as a file and is none: a pipe or a device may never end."""
    if Path(path).exists() and not Path(path).is_file():
        what = "it is a directory" if Path(path).is_dir() else "it is a pipe or a device, which may never end"
        raise OSError(errno.EINVAL, what, str(path))


def read_text(path: str | Path) -> str:
    """Return a text file, UTF-8.

    Raises:
        OSError: it can't be read, is no file, or is larger than `MOST_TEXT`.
        UnicodeDecodeError: it is no text.
    """
    check_file(path)
    with open(path, "rb") as file:
        content = file.read(MOST_TEXT + 1)
    if len(content) > MOST_TEXT:
        raise OSError(errno.EFBIG, f"it has more than {MOST_TEXT >> 20} MiB, and should be a short text", str(path))
    return content.decode("utf-8")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; what is written there becomes the content of `path` when the block ends without an error.

    The content is flushed to the disk before it gets the name, so a crash leaves the old file or the new one, never a
    part. On any exception, interrupts included, the temporary file is removed. A link is followed, and an existing
    file's permissions are kept. A device or a pipe stays what it is: the content is written into it at the end.

    Raises:
        UsageError: the folder is missing or not writable, the disk is full, `path` is a folder.
    """
    path = Path(path)
    target = _target(path)
    temporary = _reserve(path, target)
    try:
        yield temporary
        if _takes_bytes(target):
            _pour(temporary, target)
        else:
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            _flush(temporary)
            os.replace(temporary, target)
    except OSError as error:
        # An error about some other file, one that the block reads, is not ours to explain.
        if error.filename not in (None, str(temporary), str(target)):
            raise
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error; on one nothing is left.

    Raises:
        UsageError: `path` is a file or a folder with files in it, its parent is missing or not writable, the disk is
            full.
    """
    path = Path(path)
    target = _target(path)
    temporary = target.parent / f".{target.name[:32]}.{secrets.token_hex(4)}"
    try:
        if target.exists() and any(target.iterdir()):
            raise UsageError(f"cannot write {path}", why="it has files already", hint="name a new folder")
        temporary.mkdir()
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def writable_output(path: str | Path) -> Path:
    """Return `path` after checking that it can be written, so that long work is not done in vain.

    Raises:
        UsageError: as `atomic_write`.
    """
    path = Path(path)
    _reserve(path, _target(path)).unlink()
    return path


def _target(path: Path) -> Path:
    """Return what `path` names once links are followed; it need not exist yet."""
    try:
        if path.exists() and not path.is_file():
            return path  # and not what it leads to: /dev/stdout is a link to a pipe, which has no name
        target = Path(os.path.realpath(path))
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        return target
    except ValueError:
        raise _cannot_write(Path(str(path).replace("\0", "?")), OSError("its name has a NUL character")) from None
    except OSError as error:
        raise _cannot_write(path, error) from error


def _takes_bytes(target: Path) -> bool:
    """Tell whether something else than a file has this name: a device, a pipe, a socket."""
    return target.exists() and not target.is_file() and not target.is_dir()


def _reserve(path: Path, target: Path) -> Path:
    """Create an empty file beside `target`; the suffix is kept, since writers choose a format by it."""
    suffix = target.suffix if len(os.fsencode(target.suffix)) <= _LONGEST_SUFFIX else ""
    try:
        if target.is_dir() or not path.name:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if _takes_bytes(target):
            if not os.access(target, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            handle, name = tempfile.mkstemp(suffix)
            os.close(handle)
            return Path(name)
        temporary = target.parent / f".{target.stem[:32]}.{secrets.token_hex(4)}{suffix}"
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise _cannot_write(path, error) from error
    return temporary


def _pour(source: Path, target: Path) -> None:
    with source.open("rb") as content, open(os.open(target, os.O_WRONLY), "wb") as sink:
        shutil.copyfileobj(content, sink)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(path: Path, error: OSError) -> UsageError:
    why, hint = _CAUSES.get(error.errno or 0, (error.strerror or str(error), "choose another place"))
    return UsageError(f"cannot write {path.name or path}", where=str(path.absolute().parent), why=why, hint=hint)
