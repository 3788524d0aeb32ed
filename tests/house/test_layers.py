"""The floors of the house: nobody imports upwards, and no imports go round in a circle.

Imports inside functions and those for types alone count like any other: a reader follows them all.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "dvexport": "dvexport",
    "models": "dvexport.models",
    "passes": "dvexport.passes",
    "targets": "dvexport.targets",
}

LAYERS = (
    "dvexport.errors",
    "dvexport.files",
    "dvexport.numbers",
    "dvexport.names",
    "dvexport.own_folder",
    "dvexport.decisions",
    "dvexport.geometry",
    "dvexport.gate_layers",
    "dvexport.gate_decisions",
    "dvexport.tokens",
    "dvexport.ports",
    "dvexport.video",
    "dvexport.gates",
    "dvexport.models.base",
    "dvexport.models.described",
    "dvexport.models.config",
    "dvexport.models.settings",
    "dvexport.models.fits",
    "dvexport.models.pruning",
    "dvexport.models.networks",
    "dvexport.models.checkpoints",
    "dvexport.models.factory",
    "dvexport.models",
    "dvexport.models.training",
    "dvexport.graph",
    "dvexport.bundle",
    "dvexport.dialect",
    "dvexport.trace_errors",
    "dvexport.trace",
    "dvexport.passes",
    "dvexport.targets.discover",
    "dvexport.targets.table",
    "dvexport.targets.roles",
    "dvexport.targets.times",
    "dvexport.targets.runtime",
    "dvexport.targets.catalogue",
    "dvexport.targets.backend",
    "dvexport.targets.onnx",
    "dvexport.targets.tvm.native_files",
    "dvexport.targets.tvm.machine.dtype",
    "dvexport.targets.tvm.machine.rates",
    "dvexport.targets.tvm.table",
    "dvexport.targets.tvm.machine",
    "dvexport.targets.tvm.kernels",
    "dvexport.targets.tvm.build",
    "dvexport.targets.tvm.rewrites",
    "dvexport.targets.tvm.units",
    "dvexport.targets.tvm.islands",
    "dvexport.targets.tvm.plan",
    "dvexport.targets.tvm.plan_check",
    "dvexport.targets.tvm.calls",
    "dvexport.targets.tvm.plan_file",
    "dvexport.targets.tvm.session",
    "dvexport.targets.tvm",
    "dvexport.targets.tvm.tuning",
    "dvexport.targets.registry",
    "dvexport.targets",
    "dvexport.run",
    "dvexport.entries",
    "dvexport.export",
    "dvexport.rebuild",
    "dvexport.verify",
    "dvexport.profile",
    "dvexport.cli",
    "dvexport",
)
"""From the ground up. A module is on the floor of the longest name that it begins with."""

STRANGERS = {
    "dvexport.models": ("onnx", "onnx_ir", "onnxruntime", "tvm"),
    "dvexport.graph": ("torch", "tvm", "dvexport.models"),
    "dvexport.bundle": ("torch", "tvm", "dvexport.models"),
    "dvexport.dialect": ("torch", "tvm", "dvexport.models"),
    "dvexport.passes": ("torch", "tvm", "dvexport.models"),
    "dvexport.targets": ("torch", "dvexport.models"),
}
"""What each must not know, on whatever floor it is: a pass no framework, a backend no model, a model no ONNX."""


def _modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            inner = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join([package, *inner])] = path
    return found


MODULES = _modules()


def _names(path: Path) -> Iterator[str]:
    """Yield the name of everything that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path} imports by dots"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in inner)


IMPORTS = {module: set(_names(path)) - {module} for module, path in MODULES.items()}


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _floor(module: str) -> int:
    return LAYERS.index(max((layer for layer in LAYERS if _within(module, layer)), key=len))


def _circle(imports: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of one circle in the order of their imports; none if there is none."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for name in sorted(imports[module] & imports.keys()):
            if circle := search(name, [*path, module]):
                return circle
        done.add(module)
        return []

    return next(filter(None, (search(module, []) for module in sorted(imports))), [])


def test_every_layer_holds_a_module():
    empty = [layer for layer in LAYERS if not any(_floor(module) == LAYERS.index(layer) for module in MODULES)]
    assert not empty


def test_nobody_imports_upwards():
    wrong = [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        for name in sorted(names & MODULES.keys())
        if _floor(name) > _floor(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_imports_go_round_in_a_circle():
    assert not (circle := _circle(IMPORTS)), " -> ".join(circle)


def test_a_circle_is_found():
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b", "x"}}) == ["b", "c", "b"]
    assert not _circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize("importer", STRANGERS)
def test_what_a_room_must_not_know(importer):
    wrong = [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        if _within(module, importer)
        for name in sorted(names)
        if any(_within(name, stranger) for stranger in STRANGERS[importer])
    ]
    assert not wrong, "\n".join(wrong)
