"""A process for each runtime that is measured, and a pipe to it.

Runtimes in one process would share its thread pools and allocator; and threads that spin after a run, waiting for
the next, would take the cores of whoever runs next. So every runtime has a process of its own, which is stopped
(SIGSTOP) whenever it is not its turn.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.adapters import ADAPTERS, missing, version

__all__ = ["FAILED", "MISSING", "READY", "Worker"]

READY, MISSING, FAILED = "ready", "not installed", "failed"
_ROOT = Path(__file__).parents[1]
_DIE_WITH_PARENT = 1
"""`PR_SET_PDEATHSIG`: a stopped process would never see that its pipe is closed."""


class Worker:
    """A runtime in a process of its own, stopped between its turns.

    Args:
        adapter: a name of `ADAPTERS`.
        folder: the network's, with `input.npy` and `want.npy`, the logits that it must give.
        threads: how many the runtime starts.
        python: the interpreter that has the runtime's packages.

    Attributes:
        state: `READY`, or else `MISSING` or `FAILED`.
        why: what is missing or failed.
        version: the runtime's version.
        error: largest difference to the logits wanted, over the largest of these.
    """

    def __init__(self, adapter: str, folder: Path, threads: int, python: str = sys.executable) -> None:
        command = [python, "-m", "benchmarks.worker", adapter, str(folder), str(threads)]
        # How many threads there are is told each runtime by its own option.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
        with open(folder / f"{adapter} {threads}.log", "wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=_ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        reply = self._reply()
        self.state: str = reply["state"]
        self.why: str = reply.get("why", "")
        self.version: str = reply.get("version", "")
        self.error: float = reply.get("error", float("nan"))
        if self.state == READY:
            self._process.send_signal(signal.SIGSTOP)
        else:
            self.close()

    def measure(self) -> float:
        """Run once uncounted and once counted; return the seconds of the latter, timed by the worker."""
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        reply = self._reply()
        self._process.send_signal(signal.SIGSTOP)
        if "seconds" not in reply:
            raise RuntimeError(f"a worker failed: {reply['why']}")
        return reply["seconds"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        return {"state": FAILED, "why": f"its process ended with {self._process.wait()}"}


def _serve(name: str, folder: Path, threads: int) -> None:
    """Answer on what was standard output; what runtimes print goes to the log."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    if absent := missing(ADAPTERS[name]):
        answer(state=MISSING, why=", ".join(absent))
        return
    adapter, frame = ADAPTERS[name](), np.load(folder / "input.npy")
    try:
        adapter.prepare(folder, threads)
        error = _difference(adapter.run(frame), np.load(folder / "want.npy"))
    except Exception as problem:  # any runtime may raise its own
        answer(state=FAILED, why=f"{type(problem).__name__}: {problem}".splitlines()[0])
        raise
    answer(state=READY, version=version(ADAPTERS[name]), error=error)
    for _ in sys.stdin:
        adapter.run(frame)
        start = time.perf_counter()
        adapter.run(frame)
        answer(seconds=time.perf_counter() - start)


def _difference(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got.reshape(want.shape) - want).max() / np.abs(want).max())


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    _serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
