"""The file that is shipped (`.dvx`): artifact, manifest and golden data in one byte-reproducible zip.

Members are stored uncompressed in sorted order with fixed times and attributes, so the same export
gives the same bytes. `Bundle.open` trusts nothing: every member must be listed in the manifest with
its size and SHA-256, and names must stay inside the folder that a bundle is unpacked to.
"""

from __future__ import annotations

import hashlib
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol
from weakref import WeakValueDictionary

from dvexport.bundle.manifest import FileEntry, Manifest, check_member_name, parse_manifest
from dvexport.errors import BundleError, DeviceError
from dvexport.files import atomic_write, check_file

if TYPE_CHECKING:
    import numpy as np

from dvexport.graph.weights import ALIGNMENT, is_weight_file

__all__ = ["GOLDEN", "MANIFEST", "MAX_MANIFEST_BYTES", "MAX_TOTAL_BYTES", "Bundle", "Content", "write_bundle"]

MANIFEST = "manifest.json"
GOLDEN = "golden.safetensors"
MAX_TOTAL_BYTES = 8 << 30
MAX_MANIFEST_BYTES = 16 << 20

_CHUNK = 1 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest time a zip can hold."""
_MODE = (stat.S_IFREG | 0o644) << 16
_ENCRYPTED = 0x1
_HEADER, _FIELD, _ZIP64_FIELD, _PADDING_ID = 30, 4, 20, 0xD935
"""Bytes of a member's header before its name, of an empty extra field, of the one for large files; zipalign's id."""

_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    UnicodeDecodeError,
    ValueError,
    OverflowError,
    KeyError,
)
"""What zipfile raises on damaged archives, beside its own exception."""


@dataclass(frozen=True)
class Bundle:
    """A verified bundle. Files are read on demand and checked against their digest each time.

    Attributes:
        trust: its native code may be loaded though this user did not make it here (`dvexport.bundle.trust`).
    """

    path: Path
    manifest: Manifest
    trust: bool = False
    _spaces: MutableMapping[str, np.ndarray] = field(default_factory=WeakValueDictionary, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path, *, trust: bool = False) -> Bundle:
        """Verify every byte of the bundle at `path` and return it. Nothing of it runs.

        Args:
            trust: allow what is done with it to load its native code, wherever that was made. The code is a program:
                say this of bundles whose maker you trust.

        Raises:
            BundleError: it is missing, no zip, truncated, altered, has unlisted or missing files,
                unsafe names, links, compressed or too large members, or a newer format.
        """
        path = Path(path)
        with _archive(path) as archive:
            members = _checked_members(archive, path)
            manifest = parse_manifest(archive.read(members[MANIFEST]), where=f"{path}, {MANIFEST}")
            _check_listing(members, manifest, path)
            for name, entry in manifest.files.items():
                with archive.open(members[name]) as stream:
                    for _ in _verified(stream, name, entry, path):
                        pass
        return cls(path, manifest, trust)

    def read(self, name: str) -> bytes:
        """Return the content of the file `name`; BundleError if there is none or it changed meanwhile."""
        entry = self._entry(name)
        with _archive(self.path) as archive, archive.open(name) as stream:
            return b"".join(_verified(stream, name, entry, self.path))

    def array(self, name: str) -> np.ndarray:
        """Return the content of a file as uint8, read only, on a multiple of `ALIGNMENT`.

        It is read and not mapped, whatever its size, and what was read is what is checked: a bundle that is truncated
        or overwritten later can't reach whoever holds the array. All who hold it at one time hold the same one.

        Raises:
            BundleError: there is no such file, or it changed meanwhile.
            DeviceError: there is too little memory.
        """
        entry, space = self._entry(name), self._spaces.get(name)
        if space is None:
            space = _space(entry.size, name, self.path)
            with _archive(self.path) as archive, archive.open(name) as stream:
                _read_verified(stream, _content(space, entry.size), name, entry, self.path)
            space.flags.writeable = False
            self._spaces[name] = space  # what every view of it keeps alive
        return _content(space, entry.size)

    def _entry(self, name: str) -> FileEntry:
        entry = self.manifest.files.get(name)
        if entry is None and name in self.manifest.left_out:
            raise BundleError(
                f"the bundle is slim: '{name}' was left out of it",
                where=str(self.path),
                hint=f"use the whole one; dvexport verify {self.path} --whole WHOLE.dvx compares both",
            )
        if entry is None:
            known = ", ".join(sorted(self.manifest.files))
            raise BundleError(f"the bundle has no file '{name}'", where=str(self.path), why=f"it has: {known}")
        return entry

    def golden(self) -> dict[str, np.ndarray]:
        """Return the golden inputs and outputs by name.

        Raises:
            BundleError: there are none, or they can't be read.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            return load(self.read(GOLDEN))
        except SafetensorError as error:
            raise BundleError(
                "the golden data can't be read", where=f"{self.path}, {GOLDEN}", why=str(error)
            ) from error


class Chunked(Protocol):
    """A file's content that is made piece by piece; `size` in bytes."""

    size: int

    def chunks(self) -> Iterable[bytes | memoryview]:
        """Yield the pieces; the same ones each time."""


Content = bytes | memoryview | Path | Chunked


def write_bundle(
    path: str | Path, manifest: Manifest, files: Mapping[str, Content], aligned: Collection[str] = ()
) -> Bundle:
    """Write `files` and `manifest` to a bundle at `path`, whole or not at all, and return it verified.

    Args:
        manifest: without its `files` table, which is made here.
        files: by relative POSIX path, the bytes, a file that holds them, or what yields them.
        aligned: names of those that start at a multiple of `ALIGNMENT`, for whoever maps the bundle; files of weights
            do anyway.

    Raises:
        UsageError: `path` can't be written, or the disk is full.
        BundleError: a file's name is unsafe, or the whole is above the size cap.
    """
    path = Path(path)
    for name in (*files, MANIFEST):
        check_member_name(name, where=str(path))
    _check_collisions([*files, MANIFEST], path)
    table = {name: _measure(content) for name, content in files.items()}
    manifest = manifest.model_copy(update={"files": table})
    members: dict[str, Content] = {**files, MANIFEST: manifest.to_json()}
    with atomic_write(path) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for name in sorted(members):
                _add(archive, name, members[name], name in aligned or is_weight_file(name))
        # What could not be read back must not get its name.
        checked = Bundle.open(temporary)
    return Bundle(path, checked.manifest)


def _chunks(content: Content) -> Iterator[bytes | memoryview]:
    if isinstance(content, (bytes, memoryview)):
        yield content
    elif isinstance(content, Path):
        with content.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    else:
        yield from content.chunks()


def _size(content: Content) -> int:
    if isinstance(content, (bytes, memoryview)):
        return len(content)
    return content.stat().st_size if isinstance(content, Path) else content.size


def _measure(content: Content) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    for chunk in _chunks(content):
        digest.update(chunk)
        size += len(chunk)
    return FileEntry(sha256=digest.hexdigest(), size=size)


def _add(archive: zipfile.ZipFile, name: str, content: Content, aligned: bool) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system, info.external_attr, info.compress_type = 3, _MODE, zipfile.ZIP_STORED
    info.file_size = _size(content)
    if aligned:
        info.extra = _padding(archive, info)
    with archive.open(info, "w") as stream:
        for chunk in _chunks(content):
            stream.write(chunk)


def _padding(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Return the extra field that lets the next member's content start at a multiple of `ALIGNMENT` (as zipalign)."""
    assert archive.fp is not None
    zip64 = _ZIP64_FIELD if info.file_size * 1.05 > zipfile.ZIP64_LIMIT else 0  # as zipfile decides
    start = archive.start_dir + _HEADER + len(info.filename.encode()) + zip64
    size = -(start + _FIELD) % ALIGNMENT
    return struct.pack("<HH", _PADDING_ID, size) + bytes(size)


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open the zip and turn whatever damage raises, here or in the block, into BundleError."""
    try:
        check_file(path)
        with zipfile.ZipFile(path) as archive:
            yield archive
    except OSError as error:
        raise BundleError("can't read the bundle", where=str(path), why=error.strerror or str(error)) from error
    except _DAMAGE as error:
        raise BundleError(
            "the bundle is damaged or no bundle at all",
            where=str(path),
            why=str(error),
            hint="export it anew",
        ) from error


def _checked_members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the members by name after every check that needs no content."""
    infos = archive.infolist()
    for info in infos:
        # `orig_filename` still has what follows a NUL, which `filename` drops.
        check_member_name(info.orig_filename, where=str(path))
        _check_member(info, path)
    _check_collisions([info.filename for info in infos], path)
    members = {info.filename: info for info in infos}
    if MANIFEST not in members:
        raise BundleError("this is no dvexport bundle", where=str(path), why=f"it has no {MANIFEST}")
    if members[MANIFEST].file_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{MANIFEST} is larger than {MAX_MANIFEST_BYTES >> 20} MiB", where=str(path))
    total = sum(info.file_size for info in infos)
    if total > MAX_TOTAL_BYTES:
        raise BundleError(f"the bundle holds more than {MAX_TOTAL_BYTES >> 30} GiB", where=str(path))
    if total > path.stat().st_size:
        raise BundleError(
            "the bundle is truncated, or its files overlap",
            where=str(path),
            why=f"they add up to {total} bytes",
        )
    return members


def _check_member(info: zipfile.ZipInfo, path: Path) -> None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        reason = "it is a link or another special file"
    elif info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        reason = "it is compressed, and bundles are stored"
    elif info.flag_bits & _ENCRYPTED:
        reason = "it is encrypted"
    else:
        return
    raise BundleError(f"the bundle has an unsafe file '{info.filename}'", where=str(path), why=reason)


def _check_collisions(names: list[str], path: Path) -> None:
    """Refuse names that are one file on a file system that ignores case or composes accents."""
    seen: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        if key in seen:
            raise BundleError("two files of the bundle have one name", where=str(path), why=f"{seen[key]}, {name}")
        seen[key] = name


def _check_listing(members: Mapping[str, zipfile.ZipInfo], manifest: Manifest, path: Path) -> None:
    for what, names in (
        ("has files that its manifest does not list", members.keys() - manifest.files.keys() - {MANIFEST}),
        ("lacks files that its manifest lists", manifest.files.keys() - members.keys()),
    ):
        if names:
            raise BundleError(f"the bundle {what}", where=str(path), why=", ".join(sorted(names)[:5]))


def _verified(source: IO[bytes], name: str, entry: FileEntry, path: Path) -> Iterator[bytes]:
    """Yield the content of `source` in chunks; BundleError at its end if size or digest do not match."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
        yield chunk
    if size != entry.size or digest.hexdigest() != entry.sha256:
        raise _altered(name, path)


def _space(size: int, name: str, path: Path) -> np.ndarray:
    """Return memory for a file of `size` bytes, see `_content`."""
    import numpy as np

    try:
        return np.empty(size + ALIGNMENT, np.uint8)
    except MemoryError as error:
        raise DeviceError("there is too little memory", where=f"{path}, {name}", why=f"it has {size} bytes") from error


def _content(space: np.ndarray, size: int) -> np.ndarray:
    """Return the bytes of the file in its memory: they start on a multiple of `ALIGNMENT`."""
    return space[-space.ctypes.data % ALIGNMENT :][:size]


def _read_verified(source: IO[bytes], array: np.ndarray, name: str, entry: FileEntry, path: Path) -> None:
    """Fill an array with the content of `source`; BundleError if size or digest do not match."""
    at = 0
    for chunk in _verified(source, name, entry, path):
        end = at + len(chunk)
        if end > len(array):
            raise _altered(name, path)
        array[at:end] = memoryview(chunk)
        at = end


def _altered(name: str, path: Path) -> BundleError:
    why = "its SHA-256 does not match"
    return BundleError(f"the file '{name}' of the bundle was altered", where=str(path), why=why)
