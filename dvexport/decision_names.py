"""Names of the ports that show a decision, and of those that replace it."""

from __future__ import annotations

__all__ = ["FORCE", "PROBE", "decision_key", "forced_name", "probe_name"]

PROBE, FORCE = "probe.", "force."


def probe_name(gate: str, kind: str) -> str:
    """Name of the output that shows a decision; `kind` is `action`, `tiles` or `tokens`."""
    return f"{PROBE}{gate}.{kind}"


def forced_name(gate: str, kind: str) -> str:
    """Name of the input that replaces a decision."""
    return f"{FORCE}{gate}.{kind}"


def decision_key(name: str, prefix: str) -> tuple[str, str]:
    """Return (gate, kind) of the name that `probe_name` (prefix `PROBE`) or `forced_name` (`FORCE`) gave."""
    gate, _, kind = name.removeprefix(prefix).rpartition(".")
    return gate, kind
