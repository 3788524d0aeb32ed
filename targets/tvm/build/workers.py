"""Work that takes a core for seconds, in processes side by side: LLVM through TVM, and the linker.

Workers are forks of this process, so that they have the kernels as they are: TVM's form of a large one can't be written
and read again. They take tasks from a pipe and answer through pipes of their own; they touch nothing else that the
parent has. A task that fails in a worker, or whose worker was killed, is done by the parent, which says why.
"""

from __future__ import annotations

import os
import selectors
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

__all__ = ["Task", "done_in_parallel", "usable_cores"]

Task = Callable[[], bytes]

_TASK = struct.Struct("<I")
_ANSWER = struct.Struct("<IQ")
"""Number of the task, bytes that follow. A task that failed has no answer."""

_QUEUE_BYTES = 1 << 16
"""That a pipe takes before anybody reads from it."""

_WORKER_BYTES = 512 << 20
"""Memory that a worker may need beside what it shares: 0.3 GB were measured for LLVM."""

_GRACE_SECONDS = 1.0
"""For workers to end what they have started, such as the linker, and to remove its files."""


def usable_cores() -> int:
    """Return how many workers fit: by the cores that this process may use, and by the memory that is free."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _words("/sys/fs/cgroup/cpu.max")
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, -(-int(quota[0]) // int(quota[1])))
    return max(1, min(cores, *(free // _WORKER_BYTES for free in _free_memory())))


def done_in_parallel(tasks: Sequence[Task], workers: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the result of each task as it is done.

    Args:
        tasks: started in this order; the longest should come first.
        workers: processes, `usable_cores` by default. One, or a system that does not fork well: this process itself.

    Raises:
        What a task raises; the others are ended first.
    """
    count = min(len(tasks), usable_cores() if workers is None else workers, _QUEUE_BYTES // _TASK.size)
    left = set(range(len(tasks)))
    if count > 1 and sys.platform == "linux":
        for number, result in _answers(tasks, count):
            left.discard(number)
            yield number, result
    for number in sorted(left):
        yield number, tasks[number]()


def _answers(tasks: Sequence[Task], count: int) -> Iterator[tuple[int, bytes]]:
    queue = _queue(range(min(len(tasks), _QUEUE_BYTES // _TASK.size)))
    workers: dict[int, int] = {}
    try:
        for _ in range(count):
            answers, process = _fork(tasks, queue)
            workers[answers] = process
        os.close(queue)
        yield from _read_answers(list(workers))
    finally:
        _end(workers)


def _queue(numbers: Sequence[int]) -> int:
    """Return a pipe from which each worker takes the next task."""
    queue, fill = os.pipe()
    os.write(fill, b"".join(_TASK.pack(number) for number in numbers))
    os.close(fill)
    return queue


def _fork(tasks: Sequence[Task], queue: int) -> tuple[int, int]:
    """Start a worker; return the pipe of its answers and its process."""
    answers, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of ours wait, and a worker uses none
        process = os.fork()
    if process == 0:
        with suppress(BaseException):  # there is nobody to tell: the parent does again what has no answer
            os.close(answers)
            _work(tasks, queue, write)
        os._exit(0)
    os.close(write)
    return answers, process


def _work(tasks: Sequence[Task], queue: int, write: int) -> None:
    while taken := os.read(queue, _TASK.size):
        (number,) = _TASK.unpack(taken)
        with suppress(Exception):
            result = tasks[number]()
            with open(os.dup(write), "wb") as sink:
                sink.write(_ANSWER.pack(number, len(result)))
                sink.write(result)


def _read_answers(pipes: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                head = _read(key.fd, _ANSWER.size)
                number, size = _ANSWER.unpack(head) if len(head) == _ANSWER.size else (0, 0)
                result = _read(key.fd, size)
                if len(head) < _ANSWER.size or len(result) < size:  # its worker has ended
                    selector.unregister(key.fd)
                else:
                    yield number, result


def _read(pipe: int, size: int) -> bytes:
    """Return so many bytes of a pipe, fewer where it ends."""
    found = bytearray()
    while len(found) < size and (more := os.read(pipe, min(size - len(found), _QUEUE_BYTES))):
        found += more
    return bytes(found)


def _end(workers: dict[int, int]) -> None:
    """End the workers that still run, the linkers they have started too, and wait for all of them."""
    for process in workers.values():
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGINT)
    until = time.monotonic() + _GRACE_SECONDS
    for answers, process in workers.items():
        os.close(answers)
        while not os.waitpid(process, os.WNOHANG)[0]:
            if time.monotonic() > until:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                break
            time.sleep(0.01)


def _free_memory() -> Iterator[int]:
    """Yield the bytes that the system has, and that this process's control group may still take."""
    with suppress(OSError), open("/proc/meminfo", encoding="ascii") as lines:
        yield from (int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    limit, used = _words("/sys/fs/cgroup/memory.max"), _words("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdigit():
        yield max(0, int(limit[0]) - int(used[0]))
    else:
        yield sys.maxsize


def _words(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().split()
    except OSError:
        return []
