"""The static runner as a program: what it reports, on this machine and on emulated ones, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from runtime_plans import (
    assert_expected,
    expected,
    frames,
    sample_network,
    sample_plan,
    slow_once,
    write_runner,
)

EMULATORS = {
    "raspberry-pi-4": ("qemu-aarch64-static", "cortex-a72"),
    "android-arm64": ("qemu-aarch64-static", "cortex-a76"),
    "rv1126": ("qemu-arm-static", "cortex-a7"),
}
WEAKER = {"android-arm64": ("cortex-a72", "lse"), "x86-64-avx512": ("Nehalem", "avx512f")}
"""By target: a processor that lacks a feature, and the first that is missed."""


def dumped(folder: Path, steps: int) -> list[dict[str, np.ndarray]]:
    """Read back what `--dump` wrote."""
    data, at, results = (folder / "dump").read_bytes(), 0, []
    for _ in range(steps):
        result = {}
        for port in sample_plan().outputs:
            size = port.place.size
            result[port.name] = np.frombuffer(data[at : at + size], port.dtype).reshape(port.shape)
            at += size
        results.append(result)
    assert at == len(data)
    return results


def check_runner(command: list[str], folder: Path, given: np.ndarray) -> None:
    more = ["--steps", "12", "--warmup", "3", "--threads", "2", "--profile"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    seen = given[np.arange(12) % len(given)]
    assert_expected(dumped(folder, 12), seen)
    right = expected(seen)
    assert (report["steps"], report["threads"], report["memory"]) == (12, 2, sample_plan().memory)
    assert len(report["steps_ns"]) == 12
    assert report["step_ns"]["min"] <= report["step_ns"]["median"] <= report["step_ns"]["max"]
    computed = np.mean([step["probe.g.action"] == 2 for step in right])
    gate = report["gates"]["probe.g.action"]
    assert gate["compute"] == pytest.approx(computed, abs=1e-5)
    assert gate["skip"] == pytest.approx(1 - computed, abs=1e-5)
    active = np.mean([step["probe.g.tiles"] for step in right])
    assert report["gates"]["probe.g.tiles"]["active"] == pytest.approx(active, abs=1e-5)
    np.testing.assert_allclose(report["outputs"]["total"], right[-1]["total"], rtol=1e-6)
    copy = report["calls"][5]
    counts = [int((step["y"] > 0).sum()) for step in right]
    assert (copy["label"], copy["gate"]) == ("gate/copy", "g")
    few, many = sum(0 < count <= 51 for count in counts), sum(count > 51 for count in counts)
    assert copy["kernels"] == {"copy_few": few, "copy_many": many}
    assert copy["runs"] == few + many


def test_runner_reports_and_dumps(tmp_path):
    given = frames(6)
    check_runner(write_runner(sample_network(), tmp_path, given), tmp_path, given)


def test_runner_without_frames(tmp_path):
    command = write_runner(sample_network(), tmp_path, frames(1))[:3]
    done = subprocess.run([*command, "--steps", "2"], capture_output=True, text=True, timeout=60)
    report = json.loads(done.stdout)
    assert 0.3 < report["gates"]["probe.g.action"]["compute"] < 0.7


@slow_once
@pytest.mark.parametrize("target", EMULATORS)
def test_runner_on_arm(target, tmp_path):
    emulator, cpu = EMULATORS[target]
    if shutil.which(emulator) is None:
        pytest.skip(f"{emulator} is not installed (Debian's package qemu-user-static)")
    given = frames(6)
    command = write_runner(sample_network(target), tmp_path, given)
    check_runner([emulator, "-cpu", cpu, *command], tmp_path, given)


@slow_once
@pytest.mark.parametrize("target", WEAKER)
def test_a_weaker_processor_is_refused(target, tmp_path):
    emulator = "qemu-x86_64-static" if target.startswith("x86") else EMULATORS[target][0]
    if shutil.which(emulator) is None:
        pytest.skip(f"{emulator} is not installed (Debian's package qemu-user-static)")
    cpu, lacking = WEAKER[target]
    command = [emulator, "-cpu", cpu, *write_runner(sample_network(target), tmp_path, frames(1))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert re.search(rf"this processor lacks {lacking}, which the library was compiled for", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "runner PLAN WEIGHTS"),
        (["--frames"], "--frames needs a value"),
        (["PLAN", "WEIGHTS", "more"], "what is more?"),
        (["PLAN", "WEIGHTS", "--fast", "1"], "unknown option --fast"),
        (["PLAN", "WEIGHTS", "--steps", "0"], "--steps needs a whole number from 1 to 100000000, not 0"),
        (
            ["PLAN", "WEIGHTS", "--steps", "100000001"],
            "--steps needs a whole number from 1 to 100000000, not 100000001",
        ),
        (["PLAN", "WEIGHTS", "--warmup", "-1"], "--warmup needs a whole number from 0 to 100000000, not -1"),
        (["PLAN", "WEIGHTS", "--warmup", ""], "--warmup needs a whole number"),
        *[
            (["PLAN", "WEIGHTS", "--threads", text], f"--threads needs a whole number from 1 to 2147483647, not {text}")
            for text in (
                "many",
                "2x",
                " 2",
                "+2",
                "2.0",
                "0x2",
                "4294967298",
                "2147483648",
                "18446744073709551618",
                "-2",
            )
        ],
        *[
            (["PLAN", "WEIGHTS", "--cores", text], f"--cores needs numbers from 0 to 1023, such as 0,1, not {text}")
            for text in ("0,", ",0", "0,,1", "1024", "-1", "4294967296", "0 1")
        ],
        (["PLAN", "WEIGHTS", "--threads", "2", "--cores", "0"], "1 cores were given for 2 threads"),
        (["none", "WEIGHTS"], "can't read the plan none"),
        (["PLAN", "PLAN"], "the weights are of another plan"),
        (["PLAN", "WEIGHTS", "--frames", "WEIGHTS"], "not a whole number of frames"),
        (["PLAN", "WEIGHTS", "--threads", "9"], "threads is 9; this plan is laid out for 1 to 8"),
        (["PLAN", "WEIGHTS", "--threads", "2147483647"], "threads is 2147483647; this plan is laid out for 1 to 8"),
    ],
)
def test_wrong_use_of_the_runner(arguments, message, tmp_path):
    runner, plan, weights, *_ = write_runner(sample_network(), tmp_path, frames(1))
    given = [{"PLAN": plan, "WEIGHTS": weights}.get(argument, argument) for argument in arguments]
    done = subprocess.run([runner, *given], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_runner_refuses_frames_with_nan(tmp_path):
    given = frames(2)
    given[1, 0, 5] = np.nan
    done = subprocess.run(write_runner(sample_network(), tmp_path, given), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "input x has NaN or infinite values" in done.stderr
