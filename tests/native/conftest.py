"""Tests of compiled code are slow: on a machine that never ran them, each compiles and links what it calls."""

from __future__ import annotations

from pathlib import Path

import pytest

FAST = ("test_dtype.py", "test_lists.py", "test_memory.py")
"""Those that compile next to nothing."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder as slow but those of `FAST`."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.path.name not in FAST:
            item.add_marker(pytest.mark.slow)
