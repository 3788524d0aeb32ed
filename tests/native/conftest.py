"""Tests of compiled code are slow: on a machine that never ran them, each compiles and links what it calls."""

from __future__ import annotations

from pathlib import Path

import pytest
from one_of_each import FAST, ONE_OF_EACH


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder as slow, but those of `FAST` and the first case of each of `ONE_OF_EACH`."""
    here, begun = Path(__file__).parent, set()
    for item in items:
        if here not in item.path.parents or item.path.name in FAST:
            continue
        test = item.path.name, getattr(item, "originalname", item.name)
        if test not in ONE_OF_EACH.values() or test in begun:
            item.add_marker(pytest.mark.slow)
        begun.add(test)
