"""Work in processes side by side: its results, and workers that fail, are killed or are interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from native_harness import host_machine
from runtime_plans import sample_kernels

from dvexport.targets.tvm.build import cache, compile, workers
from dvexport.targets.tvm.build.workers import done_in_parallel, usable_cores

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks well")


def who(number: int) -> bytes:
    return f"{number} {os.getpid()}".encode()


def test_every_task_is_done_once_by_the_workers():
    tasks = [lambda number=number: who(number) + bytes(100_000) for number in range(40)]
    done = list(done_in_parallel(tasks, 3))
    assert sorted(number for number, _ in done) == list(range(40))
    by = {int(result.rstrip(b"\0").split()[1]) for _, result in done}
    assert os.getpid() not in by and 1 <= len(by) <= 3
    assert all(int(result.split()[0]) == number for number, result in done)


@pytest.mark.parametrize("count", [0, 1])
def test_little_work_is_done_here(count):
    assert list(done_in_parallel([lambda: who(0)] * count, 4)) == [(0, who(0))] * count
    assert {result for _, result in done_in_parallel([lambda: who(0)] * 3, 1)} == {who(0)}


def test_what_fails_in_a_worker_fails_here():
    def fail() -> bytes:
        raise ValueError(os.getpid())

    with pytest.raises(ValueError, match=str(os.getpid())):
        list(done_in_parallel([fail, lambda: b"", lambda: b""], 2))


def test_the_task_of_a_worker_that_was_killed_is_done_here():
    here = os.getpid()

    def end() -> bytes:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return b"here"

    assert dict(done_in_parallel([end, lambda: b"1", lambda: b"2", end], 2)) == {
        0: b"here", 1: b"1", 2: b"2", 3: b"here",
    }  # fmt: skip


def test_workers_end_with_who_waits_for_them(tmp_path):
    def forever() -> bytes:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(60)
        return b""

    results = done_in_parallel([forever, forever, lambda: b"", lambda: b""], 3)
    assert next(results)[1] == b""
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 10
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


INTERRUPTED = """
import os, subprocess, sys, time
from dvexport.targets.tvm.build.workers import done_in_parallel
def long():
    subprocess.run([sys.executable, "-c", "import time; print('on', flush=True); time.sleep(60)"])
    return b""
list(done_in_parallel([long, long], 2))
"""


def test_an_interrupt_ends_what_workers_have_started():
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert sorted(process.stdout.read(6)) == sorted(b"on\non\n")  # two writers: in any order
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    assert process.stdout.read() == b""  # ends when nobody holds it open


def test_no_more_workers_than_cores_and_memory(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    files = {"cpu.max": ["300000", "100000"], "memory.max": ["max"], "memory.current": ["1"]}
    monkeypatch.setattr(workers, "_words", lambda path: files[path.rpartition("/")[2]])
    assert usable_cores() <= 3
    files |= {"cpu.max": ["max", "100000"], "memory.max": [str(1 << 30)], "memory.current": ["0"]}
    assert usable_cores() == 2
    files["memory.current"] = [str(1 << 30)]
    assert usable_cores() == 1


def test_workers_compile_the_same_bytes(monkeypatch, tmp_path):
    made = []
    for count in (1, 4):
        monkeypatch.setenv(cache.VARIABLE, str(tmp_path / str(count)))
        monkeypatch.setattr(workers, "usable_cores", lambda count=count: count)
        made.append(compile.compile_kernels(sample_kernels(), host_machine()))
    assert made[0] == made[1]


def test_work_beside_is_done_if_there_is_something_to_compile(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))

    def beside() -> bytes:
        with open(tmp_path / "log", "a") as log:
            log.write("x")
        return b"x"

    for _ in range(2):
        compile.compile_kernels(sample_kernels(), host_machine(), beside=[beside])
    assert (tmp_path / "log").read_text() == "x"
