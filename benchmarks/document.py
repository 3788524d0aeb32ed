"""Put measured tables into the documents, between their markers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["DOCS", "markdown_table", "replace_block"]

DOCS = Path(__file__).parent.parent / "docs"


def replace_block(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- /NAME -->` in a document; LookupError without these."""
    pattern = rf"(?s)(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    old = path.read_text(encoding="utf-8")
    new, count = re.subn(pattern, lambda found: f"{found[1]}\n{text}\n\n{found[2]}", old)
    if not count:
        raise LookupError(f"{path} has no place for the tables '{name}'")
    path.write_text(new, encoding="utf-8")


def markdown_table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    lines = [columns, ["---"] * len(columns), *[[str(row[column]) for column in columns] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
