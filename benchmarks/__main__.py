"""Run the benchmarks and print their tables: `python -m benchmarks [SUITE ...] [--rounds N] [--json FILE]`.

Suites: `forced` (forced decisions, ONNX Runtime), `peers` (static networks in every runtime), `native` (our kernels:
forced and trained decisions, what gates cost), `artifacts` (export times and sizes), `instructions` (executed on
AArch64, under emulation), `tokens` (video transformers that drop tokens, both backends). All of them by default.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.document import DOCS, markdown_table, replace_block


@dataclass(frozen=True)
class _Measured:
    """One table.

    Attributes:
        block: where it goes in the document, if not to the place of its suite.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    block: str = ""


def main() -> None:
    """Measure, print, and write the rows to a file if asked."""
    arguments = _arguments()
    results = {suite: _SUITES[suite](arguments) for suite in arguments.suites or _SUITES}
    start = {name: _startup(code) for name, code in STARTS.items()} if "forced" in results else {}
    for name, seconds in start.items():
        print(f"{name}: {seconds:.2f} s (median of 5)")
    if arguments.write:
        for suite, tables in results.items():
            blocks: dict[str, list[str]] = {}
            for table in tables:
                text = f"**{table.title}**\n\n{markdown_table(table.columns, table.rows)}"
                blocks.setdefault(table.block or suite, []).append(text)
            if suite == "forced":
                blocks[suite].append("\n".join(f"- `{name}`: {seconds:.2f} s" for name, seconds in start.items()))
            for block, parts in blocks.items():
                replace_block(DOCS / "benchmarks.md", block, "\n\n".join(parts))
    if arguments.json:
        rows = {table.title: table.rows for suite in results.values() for table in suite}
        content = {"machine": platform.processor() or platform.machine(), "tables": rows, "startup_s": start}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    about, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=about, epilog=details)
    parser.add_argument("suites", nargs="*", choices=list(_SUITES), metavar="SUITE", help=", ".join(_SUITES))
    parser.add_argument("--rounds", type=int, default=30, help="rounds of each interleaved run")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--networks", nargs="+", default=["tsn_resnet18", "tsn_resnet50"], help="of the suite peers")
    parser.add_argument("--transformers", nargs="+", default=_TRANSFORMERS, help="of the suite tokens")
    parser.add_argument("--backends", nargs="+", default=["onnx", "tvm"], help="of the suite tokens")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers' packages")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    return parser.parse_args()


def _forced(arguments: argparse.Namespace) -> list[_Measured]:
    from benchmarks import resnet18

    suites = {"D-STEP ResNet-18, tiles forced": resnet18.tile_rows,
              "AdaFuse ResNet-18, channels forced": resnet18.channel_rows}  # fmt: skip
    return [
        _show(title, resnet18.COLUMNS, _by_threads(arguments, lambda n, make=make: make(n, arguments.rounds)))  # type: ignore[misc]
        for title, make in suites.items()
    ]


def _peers(arguments: argparse.Namespace) -> list[_Measured]:
    from benchmarks import peers

    return [
        _show(
            f"{network}, every runtime", peers.COLUMNS,
            peers.peer_rows(network, arguments.threads, arguments.rounds, arguments.peer_python),
        )
        for network in arguments.networks
    ]  # fmt: skip


def _native(arguments: argparse.Namespace) -> list[_Measured]:
    from benchmarks import native, trained

    network = native.load_network("dstep_resnet18")
    curves = _by_threads(arguments, lambda n: native.curve_rows(network, n, arguments.rounds))
    gating = _by_threads(arguments, lambda n: native.gating_rows(network, n, arguments.rounds))
    clips = [
        row for model in trained.MODELS for row in trained.trained_rows(model, arguments.threads, arguments.rounds)
    ]
    return [
        _show("D-STEP ResNet-18, native kernels, decisions forced", native.CURVES, curves),
        _show("D-STEP ResNet-18, native kernels, ms by what they are for", native.GATING, gating),
        _show("Shipped models on the shipped clips, native kernels", trained.COLUMNS, clips),
    ]


def _artifacts(arguments: argparse.Namespace) -> list[_Measured]:
    from benchmarks import artifacts

    return [_show("Native artifacts", artifacts.COLUMNS, artifacts.artifact_rows(["dstep_resnet18"]))]


def _instructions(arguments: argparse.Namespace) -> list[_Measured]:
    from benchmarks import instructions

    title = f"D-STEP ResNet-18, instructions of a step, {instructions.TARGET} ({instructions.CPU})"
    return [_show(title, instructions.COLUMNS, instructions.instruction_rows("dstep_resnet18"))]


def _tokens(arguments: argparse.Namespace) -> list[_Measured]:
    from benchmarks import tokens

    rounds = min(arguments.rounds, _CLIP_ROUNDS)
    return [
        _show(
            f"STA, {name}", tokens.COLUMNS,
            tokens.token_rows(name, tokens.rates(name), arguments.backends, arguments.threads, rounds),
            f"tokens-{name}",
        )
        for name in arguments.transformers
    ]  # fmt: skip


_TRANSFORMERS = ["vit_small", "vit_base", "video_swin_tiny"]
_CLIP_ROUNDS = 10
"""Rounds of the suite tokens at most: a step takes seconds, and varies less."""

_SUITES: dict[str, Callable[[argparse.Namespace], list[_Measured]]] = {
    "forced": _forced,
    "peers": _peers,
    "native": _native,
    "artifacts": _artifacts,
    "instructions": _instructions,
    "tokens": _tokens,
}

STARTS = {
    "import dvexport": ["-c", "import dvexport"],
    "dvexport --help": ["-c", "from dvexport.cli import main; main(['--help'])"],
}


def _by_threads(arguments: argparse.Namespace, rows: Callable[[int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for threads in arguments.threads for row in rows(threads)]


def _startup(arguments: list[str]) -> float:
    """Median wall time of a fresh interpreter."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _show(title: str, columns: tuple[str, ...], rows: list[dict[str, Any]], block: str = "") -> _Measured:
    """Print a table as soon as it is there; `block` as in `_Measured`."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*[str(row[column]) for column in columns])
    Console(width=max(Console().width, 150)).print(table)
    return _Measured(title, columns, rows, block)


if __name__ == "__main__":
    main()
