"""Run a compiled network's runner under QEMU: numbers of another processor, and how many instructions they take.

Emulation says nothing about time.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dvexport.targets.runtime import Port
from dvexport.targets.tvm.artifact import NativeArtifact

__all__ = ["count_instructions", "emulator", "run_emulated", "runner_command"]

_SECONDS = 900
_PLUGIN = Path(__file__).parent / "icount.c"


def emulator(architecture: str, *, plugins: bool = False) -> str:
    """The emulator of `aarch64` or `arm`; the test is skipped where there is none.

    Args:
        architecture: QEMU's name for it.
        plugins: one that can load plugins, which a static one can't.
    """
    name, package = (
        (f"qemu-{architecture}", "qemu-user") if plugins else (f"qemu-{architecture}-static", "qemu-user-static")
    )
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian's package {package})")
    return found


def runner_command(
    artifact: NativeArtifact, variant: str, feeds: Mapping[str, np.ndarray], inputs: Sequence[str], folder: Path
) -> list[str]:
    """Write a variant and its inputs `[T, ...]` into `folder`; the command that runs it."""
    runner, *files = (folder / name for name in ("runner", "plan", "weights", "frames"))
    for path, data in zip(
        (runner, *files),
        (artifact.runner, artifact.plans[variant], artifact.weights, _frames(feeds, inputs)),
        strict=True,
    ):
        path.write_bytes(data)
    runner.chmod(0o755)
    return [str(runner), str(files[0]), str(files[1]), "--frames", str(files[2])]


def run_emulated(
    artifact: NativeArtifact,
    variant: str,
    feeds: Mapping[str, np.ndarray],
    ports: tuple[Sequence[str], Mapping[str, Port]],
    command: Sequence[str],
    threads: int = 1,
) -> dict[str, np.ndarray]:
    """Outputs `[T, ...]` by name of a stream from reset.

    Args:
        feeds: inputs by name, `[T, ...]`.
        ports: names of the inputs and the outputs, in the order of the plan.
        command: the emulator and its options.
        threads: that share a step.
    """
    with tempfile.TemporaryDirectory(prefix="dvexport-") as name:
        folder = Path(name)
        run = runner_command(artifact, variant, feeds, ports[0], folder)
        more = ["--dump", str(folder / "dump"), "--threads", str(threads)]
        done = subprocess.run([*command, *run, *more], capture_output=True, text=True, timeout=_SECONDS)
        assert done.returncode == 0, done.stderr
        return _outputs((folder / "dump").read_bytes(), ports[1], len(next(iter(feeds.values()))))


def count_instructions(
    artifact: NativeArtifact,
    variant: str,
    feeds: Mapping[str, np.ndarray],
    inputs: Sequence[str],
    command: Sequence[str],
    steps: tuple[int, int],
) -> int:
    """Instructions of the steps from `steps[0]` to `steps[1]` of a stream: those of a longer run less a shorter's."""
    with tempfile.TemporaryDirectory(prefix="dvexport-") as name:
        folder = Path(name)
        run = runner_command(artifact, variant, feeds, inputs, folder)
        counts = []
        for number in steps:
            plugin = ["-plugin", f"{_plugin()},out={folder / 'count'}"]
            more = ["--steps", str(number)]
            done = subprocess.run(
                [command[0], *plugin, *command[1:], *run, *more], capture_output=True, text=True, timeout=_SECONDS
            )
            if "plugin" in done.stderr:
                pytest.skip(f"this QEMU takes no such plugin: {done.stderr.strip().splitlines()[0]}")
            assert done.returncode == 0, done.stderr
            counts.append(int((folder / "count").read_text(encoding="utf-8")))
    return counts[1] - counts[0]


@cache
def _plugin() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dvexport-icount-"))
    library = folder / "libicount.so"
    command = [sys.executable, "-m", "ziglang", "cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, str(_PLUGIN), "-o", str(library)], check=True)
    return library


def _frames(feeds: Mapping[str, np.ndarray], inputs: Sequence[str]) -> bytes:
    count = len(feeds[inputs[0]])
    return b"".join(np.ascontiguousarray(feeds[name][t]).tobytes() for t in range(count) for name in inputs)


def _outputs(data: bytes, ports: Mapping[str, Port], steps: int) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {name: [] for name in ports}
    at = 0
    for _ in range(steps):
        for name, port in ports.items():
            shape = tuple(int(size) for size in port.shape)
            count = int(np.prod(shape))
            found[name].append(np.frombuffer(data, port.dtype, count, at).reshape(shape))
            at += count * port.dtype.itemsize
    assert at == len(data)
    return {name: np.concatenate(arrays) for name, arrays in found.items()}
