"""Print the lowest version that pyproject.toml allows of each dependency, extras included, for pip: `NAME==VERSION`."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["lowest"]

ROOT = Path(__file__).parents[2]
EXTRAS = ("tvm", "dev")
"""What tests need beside the core; `bench` has runtimes of others."""


def lowest(project: Path = ROOT / "pyproject.toml") -> Iterator[str]:
    """Yield a requirement for each dependency; ValueError for one that has no lower bound, or not first."""
    table = tomllib.loads(project.read_text())["project"]
    for text in (*table["dependencies"], *(one for extra in EXTRAS for one in table["optional-dependencies"][extra])):
        found = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,.*)?", text)
        if found is None:
            raise ValueError(f"{text} has no lower bound")
        yield f"{found[1]}=={found[2]}"


if __name__ == "__main__":
    sys.stdout.write("\n".join(lowest()) + "\n")
