"""A cache of kernels to try things on: what is kept in it, who makes it, and how often that is asked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dvexport.targets.tvm.build import cache

__all__ = ["DATA", "KEY", "OTHER", "WHOLE", "Maker", "as_root", "ask", "kept"]

KEY, OTHER = "0" * 64, "1" * 64
DATA = bytes(range(256)) * 8
WHOLE = 56 + len(DATA)

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to another user, or mounts a small disk")


class Maker:
    """Makes the same bytes every time, and counts how often it is asked."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data, self.calls = data, 0

    def __call__(self) -> bytes:
        self.calls += 1
        return self.data


def kept(folder: Path, key: str = KEY) -> Path:
    return folder / "v2" / f"kernel-{key}"


def ask(make: Maker, times: int = 1, key: str = KEY) -> int:
    """Ask for an entry and return how often it was made."""
    before = make.calls
    for _ in range(times):
        assert cache.cached("kernel", key, make) == make.data
    return make.calls - before
