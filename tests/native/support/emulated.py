"""Run a compiled network's runner under QEMU: numbers of another processor, and how many instructions they take.

Emulation says nothing about time.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import emulation
from benchmarks.emulation import SECONDS, runner_command
from dvexport.errors import DeviceError
from dvexport.targets.runtime import Port
from dvexport.targets.tvm.artifact import NativeArtifact

__all__ = ["count_instructions", "emulator", "run_emulated", "runner_command"]


def emulator(architecture: str, *, plugins: bool = False) -> str:
    """The emulator of `aarch64` or `arm`, as `emulation.find_emulator`; the test is skipped where there is none."""
    try:
        return emulation.find_emulator(architecture, plugins=plugins)
    except DeviceError as error:
        pytest.skip(str(error))


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
        done = subprocess.run([*command, *run, *more], capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stderr
        return _outputs((folder / "dump").read_bytes(), ports[1], len(next(iter(feeds.values()))))


def count_instructions(*arguments: Any) -> int:
    """As `emulation.count_instructions`; the test is skipped where QEMU takes no plugin."""
    try:
        return emulation.count_instructions(*arguments)
    except DeviceError as error:
        if "plugin" not in str(error):
            raise
        pytest.skip(str(error))


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
