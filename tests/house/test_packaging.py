"""What is installed is what is in the folders: no package and no data file is left out."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import dvexport

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}


def _folder(package: str) -> Path:
    """Where a package's files lie, by the longest prefix of `package-dir`."""
    prefix = max((name for name in FOLDERS if f"{package}.".startswith(f"{name}.")), key=len)
    return FOLDERS[prefix].joinpath(*package.removeprefix(prefix).strip(".").split("."))


def _packages() -> set[str]:
    """Every folder that holds modules, by the name it is imported by."""
    found = set()
    for name, folder in FOLDERS.items():
        for module in folder.rglob("*.py"):
            inner = module.parent.relative_to(folder).parts
            found.add(".".join([name, *inner]))
    return found


def test_every_folder_with_modules_is_a_package():
    assert set(SETUPTOOLS["packages"]) == _packages()


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_a_package_has_an_init(package):
    assert (_folder(package) / "__init__.py").is_file()


def test_every_data_file_is_installed():
    listed = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in _folder(package).glob(pattern)
    }
    present = {
        path
        for folder in FOLDERS.values()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and not path.name.startswith(".")
    }
    assert present
    assert present == listed


@pytest.mark.parametrize(
    ("package", "pattern"),
    [(package, pattern) for package, patterns in SETUPTOOLS["package-data"].items() for pattern in patterns],
)
def test_every_pattern_of_data_finds_files(package, pattern):
    assert list(_folder(package).glob(pattern))


IMPORTED_AS = {"google": "protobuf", "onnx_ir": "onnx-ir", "PIL": "pillow", "tvm": "apache-tvm"}
"""Modules whose distribution is called otherwise."""


def test_everything_imported_is_a_dependency():
    project = PROJECT["project"]
    core, native = _declared(project["dependencies"]), _declared(project["optional-dependencies"]["tvm"])
    core |= {"protobuf", "markupsafe"}  # onnx and jinja2 cannot be without them
    for folder in FOLDERS.values():
        for path in folder.rglob("*.py"):
            names = {IMPORTED_AS.get(name, name) for name in _top_level_imports(path)}
            allowed = core | native if "tvm" in path.parts else core
            assert names - set(sys.stdlib_module_names) - {"dvexport"} <= allowed, path


def _declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~\[]", text)[0] for text in requirements}


def _top_level_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("name", dvexport.__all__)
def test_what_the_package_offers_is_where_it_says(name):
    assert getattr(dvexport, name).__name__ == name
