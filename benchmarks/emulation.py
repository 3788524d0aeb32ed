"""How many instructions a compiled network executes, counted by QEMU, which emulates its processor.

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

from dvexport.errors import DeviceError
from dvexport.targets.tvm.artifact import NativeArtifact

__all__ = ["SECONDS", "count_instructions", "find_emulator", "runner_command"]

SECONDS = 900
"""How long a run may take."""

_PLUGIN = Path(__file__).parent / "icount.c"


def find_emulator(architecture: str, *, plugins: bool = False) -> str:
    """Return the emulator of `aarch64` or `arm`.

    Args:
        architecture: QEMU's name for it.
        plugins: one that can load plugins, which a static one can't.

    Raises:
        DeviceError: it is not installed.
    """
    name, package = (
        (f"qemu-{architecture}", "qemu-user") if plugins else (f"qemu-{architecture}-static", "qemu-user-static")
    )
    found = shutil.which(name)
    if found is None:
        raise DeviceError(f"{name} is not installed", where="PATH", hint=f"install Debian's package {package}")
    return found


def runner_command(
    artifact: NativeArtifact, variant: str, feeds: Mapping[str, np.ndarray], inputs: Sequence[str], folder: Path
) -> list[str]:
    """Write a variant and its inputs `[T, ...]` into `folder`; return the command that runs it."""
    runner, *files = (folder / name for name in ("runner", "plan", "weights", "frames"))
    for path, data in zip(
        (runner, *files),
        (artifact.runner, artifact.plans[variant], artifact.weights, _frames(feeds, inputs)),
        strict=True,
    ):
        path.write_bytes(data)
    runner.chmod(0o755)
    return [str(runner), str(files[0]), str(files[1]), "--frames", str(files[2])]


def count_instructions(
    artifact: NativeArtifact,
    variant: str,
    feeds: Mapping[str, np.ndarray],
    inputs: Sequence[str],
    command: Sequence[str],
    steps: tuple[int, int],
) -> int:
    """Return the instructions of the steps from `steps[0]` to `steps[1]` of a stream: a longer run's less a shorter's.

    Args:
        artifact: compiled for the emulated processor.
        variant: which plan.
        feeds: inputs by name, `[T, ...]`.
        inputs: names of the inputs in the order of the plan.
        command: the emulator and its options; it has to take plugins.
        steps: see above.

    Raises:
        DeviceError: this QEMU takes no such plugin.
    """
    with tempfile.TemporaryDirectory(prefix="dvexport-") as name:
        folder = Path(name)
        run = runner_command(artifact, variant, feeds, inputs, folder)
        counts = []
        for number in steps:
            plugin = ["-plugin", f"{_plugin()},out={folder / 'count'}"]
            more = ["--steps", str(number)]
            done = subprocess.run(
                [command[0], *plugin, *command[1:], *run, *more], capture_output=True, text=True, timeout=SECONDS
            )
            if "plugin" in done.stderr:
                raise DeviceError("this QEMU takes no such plugin", where=command[0], why=_first_line(done.stderr))
            if done.returncode:
                raise DeviceError("the emulated runner failed", where=command[0], why=_first_line(done.stderr))
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


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "no message")
