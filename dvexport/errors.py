"""The one family of exceptions: what happened, where, why, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BundleError",
    "CheckFailed",
    "CheckpointError",
    "ClipError",
    "DeviceError",
    "DvexportError",
    "PassError",
    "TraceError",
    "UntoldError",
    "UsageError",
    "unknown_name",
]


class DvexportError(Exception):
    """Base of every error a user can meet.

    Args:
        what: one sentence that says what happened.
        where: the file, node, gate or key concerned.
        why: the cause, when it is known.
        hint: what to do about it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.why, self.hint = what, where, why, hint
        super().__init__(self._text())

    def _text(self) -> str:
        lines = [self.what]
        for label, value in (("where", self.where), ("why", self.why), ("try", self.hint)):
            if value:
                lines.append(f"  {label}: {value}")
        return "\n".join(lines)


class UsageError(DvexportError):
    """A wrong argument, an unknown name, an option that does not fit."""


class CheckpointError(DvexportError):
    """A checkpoint that is missing, damaged, unsafe or made for another model."""


class UntoldError(CheckpointError):
    """A checkpoint that leaves options open which change its numbers.

    Attributes:
        settings: one `KEY=VALUE` for each, at the default that `assume_defaults` takes.
    """

    def __init__(self, what: str, *, where: str, why: str, hint: str, settings: list[str]) -> None:
        super().__init__(what, where=where, why=why, hint=hint)
        self.settings = settings


class ClipError(DvexportError):
    """A video that can't be read or has too few frames."""


class TraceError(DvexportError):
    """A model that can't be traced, or can't run in the mode asked for."""


class PassError(DvexportError):
    """A graph pass whose contract does not hold."""


class BundleError(DvexportError):
    """A bundle that is altered, truncated, unsafe or from a newer format."""


class CheckFailed(DvexportError):
    """A comparison that did not hold (`verify`, `models --figures`)."""

    exit_code = 1


class DeviceError(DvexportError):
    """A device, a disk or an installed package that is not as needed."""

    exit_code = 3


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Return the error for an unknown `name`, suggesting the nearest of `known`."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"one of: {', '.join(known)}"
    return UsageError(f"unknown {kind} '{name}'", hint=hint)
