"""What a native export takes: its time with an empty and a filled cache of kernels, its bytes and its memory."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.compiled import host
from dvexport import Bundle
from dvexport.own_folder import make_private
from dvexport.targets.tvm.build.cache import usable_folder
from dvexport.targets.tvm.build.cache_files import list_entries, read_entry, tree_of
from dvexport.targets.tvm.build.link import link_library, link_runner
from dvexport.targets.tvm.native_files import LIBRARY

__all__ = ["COLUMNS", "artifact_rows", "text_bytes"]

COLUMNS = (
    "model", "cold export s", "warm export s", "kernels", "kernel text KB", "runtime KB", "runner KB", "library KB",
    "weights MB", "arena MB", "arena over bound", "states MB",
)  # fmt: skip

_SECTION = struct.Struct("<IIQQQQIIQQ")
_EXECUTABLE = 4


def artifact_rows(models: list[str]) -> list[dict[str, Any]]:
    """Export models twice, each with a cache of its own, by the command line as a user would."""
    rows = []
    machine = host()
    runtime = {
        "runtime KB": _kb(len(link_library({}, [], machine))),
        "runner KB": _kb(len(link_runner({}, [], machine))),
    }
    for model in models:
        with tempfile.TemporaryDirectory(prefix="dvexport-bench-") as name:
            folder = Path(name)
            kept = _provide_libraries(folder / "cache")
            cold, warm = (_export(model, folder) for _ in range(2))
            objects = [read_entry(each.path) or b"" for each in list_entries(kept) if each.kind == "kernel"]
            bundle = Bundle.open(folder / "model.dvx")
            memory = bundle.manifest.memory
            rows.append(
                {
                    "model": model, "cold export s": round(cold, 1), "warm export s": round(warm, 1),
                    "kernels": len(objects), "kernel text KB": _kb(sum(map(text_bytes, objects))), **runtime,
                    "library KB": _kb(len(bundle.read(LIBRARY))), "weights MB": _mb(memory["weights"]),
                    "arena MB": _mb(memory["arena"]), "states MB": _mb(memory["states"]),
                    "arena over bound": round(memory["arena"] / max(memory["arena_bound"], 1), 3),
                }
            )  # fmt: skip
    return rows


def text_bytes(data: bytes) -> int:
    """Return the bytes of machine code in an object file (ELF, 64 bits, little-endian)."""
    assert data[:6] == b"\x7fELF\x02\x01", "not a 64-bit ELF file"
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = (_SECTION.unpack_from(data, start + i * size) for i in range(count))
    return sum(section[5] for section in sections if section[2] & _EXECUTABLE)


def _provide_libraries(folder: Path) -> Path:
    """Give a new cache what the compiler builds once for a target, so that exports are timed without it.

    Returns where its entries are.
    """
    kept = usable_folder()
    assert kept is not None, "the kernel cache is not used: see dvexport cache"
    place = folder / kept.name
    make_private(place)
    for entry in list_entries(kept):
        if entry.kind == "zig":
            shutil.copy2(entry.path, place)
            shutil.copytree(tree_of(entry.path), tree_of(place / entry.path.name))
    return place


def _export(model: str, folder: Path) -> float:
    """Return the seconds of an export."""
    command = [sys.executable, "-m", "dvexport", "export", model, "--backend", "tvm", "-o", str(folder / "model.dvx")]
    begin = time.perf_counter()
    environment = {**os.environ, "DVEXPORT_CACHE": str(folder / "cache")}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def _kb(size: int) -> float:
    return round(size / 1e3, 1)


def _mb(size: int) -> float:
    return round(size / 1e6, 2)
