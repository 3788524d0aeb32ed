"""What every backend's runtime offers, and what a session needs of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dvexport.numbers import whole_number
from dvexport.targets.times import NodeTimes

__all__ = ["DEFAULT_THREADS", "MOST_THREADS", "Port", "Runtime", "Variant", "checked_threads"]

MOST_THREADS = 32
"""Threads that the native runtime has room for (`DVX_MAX_THREADS` of tvm/runtime/dvx.h), whatever the plan."""

DEFAULT_THREADS = 8
"""Threads that a native plan is laid out for where nobody knows the cores of what it will run on."""


def checked_threads(threads: object, most: int, *, why: str, hint: str | None = None) -> int:
    """Return a number of threads from 1 to `most`; UsageError for others, which names the limit and `why` it is one."""
    return whole_number(threads, "threads", least=1, most=most, why=why, hint=hint)


@dataclass(frozen=True)
class Port:
    """An input or output: its type, and its shape with a name where a size is open."""

    shape: tuple[int | str, ...]
    dtype: np.dtype


class Runtime(Protocol):
    """An artifact ready to run, its states at zero.

    Attributes:
        inputs, outputs: what is fed and returned, states left out.
        seconds: duration of the last `run` inside the runtime.
    """

    @property
    def inputs(self) -> Mapping[str, Port]:
        """What `run` is fed."""

    @property
    def outputs(self) -> Mapping[str, Port]:
        """What `run` returns."""

    @property
    def seconds(self) -> float:
        """Duration of the last `run`."""

    def reset(self) -> None:
        """Set every state to zero."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one step over every input; DeviceError if the runtime fails."""

    def end_profile(self) -> Any:
        """Return what was recorded of all steps so far, for `Variant.times`; only if opened with `profile`."""

    def close(self) -> None:
        """Free everything; a closed runtime can't be used (DeviceError), and may be closed again."""


class Variant(Protocol):
    """A model as its backend's runtime reads it."""

    def open(self, *, threads: int = 1, profile: bool = False) -> Runtime:
        """Open it on this machine; with `profile` the time of every node or kernel is recorded.

        Raises:
            UsageError: more threads than the runtime takes, or no number of them.
            DeviceError: the runtime is missing, or can't load it.
        """

    def times(self, recording: Any, gates: Collection[str], dense: Any, passes: int) -> NodeTimes:
        """Return what a recording of this variant says of its nodes and gates.

        Args:
            recording: what `Runtime.end_profile` returned of several passes over the same frames.
            gates: names of the gates.
            dense: the dense variant of the same bundle.
            passes: how many passes; the first is a warm-up.
        """
