"""Run the benchmarks and print their tables: `python -m benchmarks [--rounds N] [--json FILE]`."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import resnet18
from benchmarks.document import DOCS, markdown_table, replace_block

COLUMNS = ("threads", "side", "ms", "spread", "flops", "speedup", "realisation")


def main() -> None:
    """Measure, print, and write the rows to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="rounds of each interleaved run")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {
        "D-STEP ResNet-18, tiles forced": [],
        "AdaFuse ResNet-18, channels forced": [],
    }
    for threads in arguments.threads:
        results["D-STEP ResNet-18, tiles forced"] += resnet18.tile_rows(threads, arguments.rounds)
        results["AdaFuse ResNet-18, channels forced"] += resnet18.channel_rows(threads, arguments.rounds)
    for title, rows in results.items():
        _print(title, rows)
    start = {name: _startup(code) for name, code in STARTS.items()}
    for name, seconds in start.items():
        print(f"{name}: {seconds:.2f} s (median of 5)")
    if arguments.write:
        blocks = [f"**{title}**\n\n{markdown_table(COLUMNS, rows)}" for title, rows in results.items()]
        times = [f"- `{name}`: {seconds:.2f} s" for name, seconds in start.items()]
        replace_block(DOCS / "benchmarks.md", "forced", "\n\n".join([*blocks, "\n".join(times)]))
    if arguments.json:
        content = {"machine": platform.processor() or platform.machine(), "tables": results, "startup_s": start}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


STARTS = {
    "import dvexport": ["-c", "import dvexport"],
    "dvexport --help": ["-c", "from dvexport.cli import main; main(['--help'])"],
}


def _startup(arguments: list[str]) -> float:
    """Median wall time of a fresh interpreter."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*COLUMNS, title=f"{title} (224 x 224, one frame a step, against the dense artifact)")
    for row in rows:
        table.add_row(*[str(row[column]) for column in COLUMNS])
    Console().print(table)


if __name__ == "__main__":
    main()
