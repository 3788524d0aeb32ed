"""As many threads as a plan is laid out for, and one more: in Python, C and the runner, with kernels that compute."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from native_networks import TOLERANCE, artifact, machine_for, variants
from oracle_check import FRAMES, traced, video

from dvexport.errors import UsageError
from dvexport.targets.runtime import DEFAULT_THREADS, MOST_THREADS
from dvexport.targets.tvm.artifact import NativeArtifact, build_artifact
from dvexport.targets.tvm.build import link
from dvexport.targets.tvm.calls.draft import ALGORITHMS
from dvexport.targets.tvm.machine.dtype import F32
from dvexport.targets.tvm.session import NativeSession

SMALL = ("dstep", "uneven")
LIMIT = DEFAULT_THREADS
VARIANTS = ("gated", "dense")
HERE = Path(__file__).parent


@cache
def laid_out_for(threads: int) -> NativeArtifact:
    """The small network, with memory for some number of threads; its dense variant for `LIMIT` only."""
    if threads == LIMIT:
        return artifact(*SMALL)
    models = variants(traced(*SMALL), "stream", FRAMES, ("gated",))
    return build_artifact(models, machine_for("host"), lambda _: None, threads=threads)


def opened(made: NativeArtifact, variant: str, threads: int) -> NativeSession:
    return NativeSession(made.library, made.plans[variant], made.weights, threads=threads)


def frames() -> np.ndarray:
    return np.concatenate([video(SMALL[1], seed) for seed in (5, 6)])


def logits(session: NativeSession) -> np.ndarray:
    return np.concatenate([session.run({"frames": frame[None]})["logits"] for frame in frames()])


@cache
def alone(variant: str) -> np.ndarray:
    """What one thread gives."""
    with opened(laid_out_for(LIMIT), variant, 1) as session:
        return logits(session)


def assert_same(found: np.ndarray, variant: str) -> None:
    np.testing.assert_allclose(found, alone(variant), rtol=0, atol=TOLERANCE * float(np.abs(alone(variant)).max()))


def write(folder: Path, variant: str) -> dict[str, str]:
    """Write an artifact's files and the frames; returns their paths."""
    made = laid_out_for(LIMIT)
    contents = {
        "library": made.library, "runner": made.runner, "plan": made.plans[variant], "weights": made.weights,
        "frames": frames().tobytes(),
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "runner").chmod(0o755)
    return {name: str(folder / name) for name in contents}


# --- Python


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("threads", range(2, LIMIT + 1))
def test_every_number_of_threads_gives_what_one_gives(variant, threads):
    with opened(laid_out_for(LIMIT), variant, threads) as session:
        assert session.max_threads == LIMIT
        assert_same(logits(session), variant)


@pytest.mark.parametrize("limit", [LIMIT, MOST_THREADS])
def test_the_limit_is_the_plans(limit):
    made = laid_out_for(limit)
    with opened(made, "gated", limit) as session:
        assert (session.info.threads, session.info.max_threads) == (limit, limit)
        assert_same(logits(session), "gated")
    with pytest.raises(UsageError, match=f"threads must be a whole number from 1 to {limit}, not {limit + 1}"):
        opened(made, "gated", limit + 1)


def test_every_algorithm_was_among_them():
    """Or the tests above would hold of one that lays out its scratch for fewer threads."""
    made, seen = laid_out_for(LIMIT), set()
    for variant in VARIANTS:
        with NativeSession(made.library, made.plans[variant], made.weights, threads=LIMIT, profile=True) as session:
            logits(session)
            seen |= {call.kernel for step in session.end_profile() for call in step if call.kernel}
        with pytest.raises(UsageError, match=f"from 1 to {LIMIT}, not {LIMIT + 1}"):
            opened(made, variant, LIMIT + 1)
    for algorithm in ALGORITHMS:
        assert any(kernel.startswith(f"{F32}_{algorithm}") for kernel in seen), algorithm


def test_memory_for_threads_is_in_the_arena():
    assert laid_out_for(LIMIT).memory["arena"] < laid_out_for(MOST_THREADS).memory["arena"]


# --- C


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> str:
    """`step_network.c`, compiled."""
    path = tmp_path_factory.mktemp("program") / "step_network"
    command = [sys.executable, "-m", "ziglang", "cc", "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"]
    source = [f"-I{link.RUNTIME}", str(HERE / "step_network.c"), "-ldl", "-o", str(path)]
    done = subprocess.run([*command, *source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(path)


def run_program(program: str, files: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[bytes]:
    given = [files[name] for name in ("library", "plan", "weights", "frames")]
    return subprocess.run([program, *given, *arguments], capture_output=True, timeout=60)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("threads", [5, LIMIT])
def test_a_program_in_c(program, variant, threads, tmp_path):
    done = run_program(program, write(tmp_path, variant), str(threads))
    assert (done.returncode, done.stderr.decode().strip()) == (0, str(LIMIT))
    assert_same(np.frombuffer(done.stdout, np.float32).reshape(alone(variant).shape), variant)


@pytest.mark.parametrize("threads", [LIMIT + 1, MOST_THREADS, 2**31 - 1, -1, -(2**31)])
def test_a_program_in_c_is_told_the_limit(program, threads, tmp_path):
    done = run_program(program, write(tmp_path, "gated"), str(threads))
    message = f"threads is {threads}; this plan is laid out for 1 to {LIMIT}"
    assert (done.returncode, done.stdout, done.stderr.decode().strip()) == (1, b"", message)


@pytest.mark.parametrize("how", ["cut", "overwrite"])
def test_files_that_change_under_an_open_network_change_nothing(program, how, tmp_path):
    done = run_program(program, write(tmp_path, "gated"), "2", how)
    assert done.returncode == 0, done.stderr
    assert_same(np.frombuffer(done.stdout, np.float32).reshape(alone("gated").shape), "gated")
    assert (tmp_path / "weights").read_bytes()[:64] == (b"" if how == "cut" else b"\x3f" * 64)


# --- the runner


def run_runner(files: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    given = [files[name] for name in ("runner", "plan", "weights")]
    return subprocess.run([*given, "--frames", files["frames"], *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("threads", [5, LIMIT])
def test_the_runner(variant, threads, tmp_path):
    done = run_runner(write(tmp_path, variant), "--threads", str(threads))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["threads"], report["max_threads"], report["steps"]) == (threads, LIMIT, len(frames()))
    bound = TOLERANCE * float(np.abs(alone(variant)).max())
    np.testing.assert_allclose(report["outputs"]["logits"], alone(variant)[-1], rtol=0, atol=bound)


def test_the_runner_tells_the_limit(tmp_path):
    done = run_runner(write(tmp_path, "gated"), "--threads", str(LIMIT + 1))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"runner: threads is {LIMIT + 1}; this plan is laid out for 1 to {LIMIT}\n"


def test_the_header_has_room_for_as_many_as_python_says():
    text = (link.RUNTIME / "dvx.h").read_text()
    assert f"#define DVX_MAX_THREADS {MOST_THREADS} " in text
