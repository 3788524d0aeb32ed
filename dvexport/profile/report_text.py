"""A profile as text for the terminal: headline, one row a gate or a place where tokens are dropped, advice."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dvexport.profile.advice import advise
from dvexport.profile.result import GateStats, ProfileResult

__all__ = ["gate_table", "headline", "number", "print_result", "token_table"]

PIPED_WIDTH = 160


def number(value: float | None, digits: int = 2) -> str:
    """Return `value` with `digits` decimals, a dash where it is unknown."""
    return "-" if value is None else f"{value:.{digits}f}"


def headline(result: ProfileResult) -> str:
    """Return the lines above the table: what was measured, times, and the three figures."""
    gated, dense, executed = result.gated, result.dense, result.executed_gmacs
    unit = result.unit
    lines = [
        f"{result.model} for {result.target} ({result.backend}, {result.mode}) on {result.device.cpu}: "
        f"{result.clip.name}, {len(result.steps)} {unit}{'' if len(result.steps) == 1 else 's'}, "
        f"{result.device.threads} thread(s)",
        f"gated  median {gated.median:.2f} ms   P90 {gated.p90:.2f}   P99 {gated.p99:.2f}   "
        f"GMACs per {unit} {executed.min:.3f} / {executed.mean:.3f} / {executed.max:.3f} (min / mean / max)",
    ]
    if dense:
        lines.append(
            f"dense  median {dense.median:.2f} ms   P90 {dense.p90:.2f}   P99 {dense.p99:.2f}   "
            f"GMACs per {unit} {result.dense_gmacs:.3f}"
        )
    if result.forced:
        lines.append("forced " + ", ".join(f"{name}={rate:g}" for name, rate in result.forced.items()))
    lines.append(
        f"speed-up {number(result.speedup)}   FLOP ratio {number(result.flop_ratio)}   "
        f"realisation {number(result.realisation)}"
    )
    return "\n".join(lines)


def gate_table(result: ProfileResult) -> Table:
    """Return the table with one row a gate."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("gate", "lowering"):
        table.add_column(column, no_wrap=True)
    for column in ("GMACs\nmin", "mean", "max", "dense", "ms", "dense\nms", "FLOP\nratio", "reali-\nsation"):
        table.add_column(column, justify="right")
    for gate in result.gates:
        table.add_row(*_row(gate))
    return table


def token_table(result: ProfileResult) -> Table:
    """Return the table with one row for each place where tokens are dropped, all of its groups together."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage", no_wrap=True)
    for column in ("groups", "tokens", "left", "dropped"):
        table.add_column(column, justify="right")
    for stage in result.tokens:
        before, left = stage.groups * stage.tokens, stage.groups * stage.keep
        table.add_row(escape(stage.name), str(stage.groups), str(before), str(left), f"{1 - left / before:.0%}")
    return table


def _row(gate: GateStats) -> list[str]:
    executed = gate.executed_gmacs
    gmacs = [executed.min, executed.mean, executed.max, gate.dense_gmacs]
    rest = [gate.median_ms, gate.dense_median_ms, gate.flop_ratio, gate.realisation]
    return [
        escape(gate.gate),
        escape(gate.lowering),
        *(number(value, 3) for value in gmacs),
        *(number(value) for value in rest),
    ]


def print_result(result: ProfileResult, console: Console | None = None) -> None:
    """Print headline, tables and advice; plain text when the output is no terminal."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=PIPED_WIDTH, color_system=None)
    console.print(escape(headline(result)), highlight=False, soft_wrap=True)
    console.print()
    if result.gates or not result.tokens:
        console.print(gate_table(result))
        console.print()
    if result.tokens:
        console.print(token_table(result))
        if result.tokens_ms is not None:
            console.print(f"choosing them takes {number(result.tokens_ms)} ms", highlight=False)
        console.print()
    for advice in advise(result):
        where = f"{advice.gate}: " if advice.gate else ""
        console.print(
            escape(f"{advice.severity}: {where}{advice.text} {advice.act}".rstrip()), highlight=False, soft_wrap=True
        )
