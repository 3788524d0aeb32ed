"""What every backend's runtime offers, and what a session needs of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

__all__ = ["Port", "Runtime", "Variant"]


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
        """Return what was recorded of all steps so far; only if opened with `profile`."""


class Variant(Protocol):
    """A model as its backend's runtime reads it."""

    def open(self, *, threads: int = 1, profile: bool = False) -> Runtime:
        """Open it on this machine; with `profile` the time of every node or kernel is recorded.

        Raises:
            DeviceError: the runtime is missing, or can't load it.
        """
