"""The files of a bundle in a folder."""

from __future__ import annotations

from pathlib import Path

from dvexport.bundle.archive import MANIFEST, Bundle
from dvexport.files import new_folder

__all__ = ["unpack"]

_PROGRAM = b"\x7fELF"
"""How programs and libraries for Linux and Android begin."""


def unpack(bundle: Bundle, output: str | Path) -> list[Path]:
    """Write the files of a bundle and its manifest into a folder, all or none, and return their paths.

    Raises:
        UsageError: the folder has files already, or can't be written.
        BundleError: the bundle changed meanwhile.
    """
    files = sorted([*bundle.manifest.files, MANIFEST])
    with new_folder(output) as folder:
        for name in files:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = bundle.manifest.to_json() if name == MANIFEST else bundle.array(name).data
            path.write_bytes(content)
            if bytes(content[: len(_PROGRAM)]) == _PROGRAM:
                path.chmod(path.stat().st_mode | 0o111)
    return [Path(output) / name for name in files]
