"""Slim bundles: what a device needs to run an artifact, and the digests of what was left out.

A whole bundle proves itself: it has the traced model, golden data and dense variant. A device needs none of that. A
slim bundle keeps each of its files as it is, or as much of its beginning as the artifact reads, so that it can be
compared with the whole one byte by byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dvexport.bundle.archive import MANIFEST, Bundle, write_bundle
from dvexport.bundle.trust import has_code, made_here, remember
from dvexport.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from dvexport.bundle.archive import Content
    from dvexport.bundle.manifest import FileEntry

__all__ = ["compare_with_whole", "slim"]


def slim(bundle: Bundle, output: str | Path, needed: Mapping[str, int]) -> Bundle:
    """Write what a device needs of a bundle to another one, and return that.

    Args:
        needed: files, and how many bytes of each from its start: `Backend.needed` tells.

    Raises:
        UsageError: it is slim already, or the output can't be written.
        BundleError: a file of it can't be read.
    """
    if bundle.manifest.left_out:
        raise UsageError("the bundle is slim already", where=str(bundle.path))
    files: dict[str, Content] = {name: bundle.array(name)[:size].data for name, size in needed.items()}
    left_out = {name: entry for name, entry in bundle.manifest.files.items() if needed.get(name) != entry.size}
    made = write_bundle(output, bundle.manifest.model_copy(update={"left_out": left_out}), files)
    if has_code(made.manifest) and made_here(bundle.manifest):
        remember(made.manifest)
    return replace(made, trust=bundle.trust)


def compare_with_whole(slimmed: Bundle, whole: Bundle) -> None:
    """Check that a slim bundle was made of a whole one, byte by byte.

    Raises:
        UsageError: the first is not slim, or the second is.
        CheckFailed: they differ; names the first file that does.
    """
    if not slimmed.manifest.left_out:
        raise UsageError("the bundle is whole itself", where=str(slimmed.path), hint="verify it without --whole")
    if whole.manifest.left_out:
        raise UsageError("what is given as the whole bundle is slim", where=str(whole.path))
    different = list(_differences(slimmed, whole))
    if different:
        raise CheckFailed(
            "the slim bundle was not made of this whole one",
            where=f"{slimmed.path}, {whole.path}",
            why=f"they differ in {', '.join(different[:3])}",
        )


def _differences(slimmed: Bundle, whole: Bundle) -> Iterator[str]:
    """Yield the files of which a slim bundle says another thing than a whole one."""
    mine, theirs = slimmed.manifest, whole.manifest
    without: dict[str, dict[str, FileEntry]] = {"files": {}, "left_out": {}}
    if mine.model_copy(update=without) != theirs.model_copy(update=without):
        yield MANIFEST
    for name in sorted(mine.files.keys() | mine.left_out.keys() | theirs.files.keys()):
        kept, left, entry = mine.files.get(name), mine.left_out.get(name), theirs.files.get(name)
        if entry is None or (left or kept) != entry or (kept and kept.sha256 != _start(whole, name, kept.size)):
            yield name


def _start(bundle: Bundle, name: str, size: int) -> str:
    """Return the SHA-256 of the first bytes of a file, in hexadecimal."""
    return hashlib.sha256(bundle.array(name)[:size].data).hexdigest()
