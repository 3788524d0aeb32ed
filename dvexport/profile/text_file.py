"""Write a text file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from dvexport.errors import DeviceError

__all__ = ["write_text"]


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to a temporary name beside `path`, then rename it to `path`.

    Raises:
        DeviceError: the folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise DeviceError(
            "cannot write the file", where=str(path), why=error.strerror, hint="choose another place"
        ) from error
