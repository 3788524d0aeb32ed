"""The fast suite runs a kernel of each family, from a test that exists."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from one_of_each import FAST, ONE_OF_EACH

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "targets" / "tvm" / "kernels"


def path_of(name: str) -> Path:
    (path,) = (ROOT / "tests" / "native").rglob(name)
    return path


def functions(name: str) -> dict[str, ast.FunctionDef]:
    found = ast.parse(path_of(name).read_text(encoding="utf-8")).body
    return {node.name: node for node in found if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_it_exists_and_is_not_called_slow(family):
    name, test = ONE_OF_EACH[family]
    function = functions(name)[test]
    assert not any("slow" in ast.unparse(mark) for mark in function.decorator_list)


def test_every_module_with_kernels_is_imported_by_one_of_them():
    """A kernel is what a function returns; whoever adds a module of them adds a line."""
    modules = {path.stem for path in KERNELS.rglob("*.py") if "-> Kernel:" in path.read_text(encoding="utf-8")}
    assert {"direct", "winograd", "pooling", "lists", "matmul"} <= modules
    files = [*FAST, *(name for name, _ in ONE_OF_EACH.values())]
    assert modules <= set().union(*map(imported, files))


def imported(name: str) -> set[str]:
    """Last names of the modules that a test file imports, or imports from."""
    found = set()
    for node in ast.walk(ast.parse(path_of(name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module.rpartition(".")[2], *(alias.name for alias in node.names)}
    return found
