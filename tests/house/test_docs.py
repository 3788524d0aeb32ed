"""The documents say what the code does: every operator is described, every example runs."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from dvexport.dialect import OPERATORS
from dvexport.dialect.conv import CONV_ATTRIBUTES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SECTION = re.compile(r"^### `dv\.(\w+)\((.*?)\) -> (.*?)`\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def dialect() -> dict[str, tuple[str, str, str]]:
    """Name of each operator described, to its inputs, outputs and text."""
    text = (DOCS / "dialect.md").read_text(encoding="utf-8")
    return {name: (inputs, outputs, body) for name, inputs, outputs, body in SECTION.findall(text)}


def test_the_dialect_document_has_no_operator_too_many(dialect):
    assert set(dialect) == set(OPERATORS)


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_an_operator_is_described_whole(dialect, name):
    operator, (inputs, outputs, body) = OPERATORS[name], dialect[name]
    assert tuple(inputs.split(", ")) == operator.inputs
    assert tuple(outputs.split(", ")) == operator.outputs
    shared = set(CONV_ATTRIBUTES) if "Attributes: those of every convolution" in body else set()
    described = shared | set(re.findall(r"`(\w+)`", body.partition("Attributes:")[2]))
    assert set(operator.attributes) <= described
    required = {key for key, default in operator.attributes.items() if default is None} - shared
    assert all(f"`{key}` (required)" in body for key in required)


def test_the_shared_attributes_are_in_the_table():
    text = (DOCS / "dialect.md").read_text(encoding="utf-8")
    rows = {cells[1].strip(" `") for line in text.splitlines() if len(cells := line.split("|")) == 5}
    assert set(CONV_ATTRIBUTES) <= rows


def test_the_example_of_adding_a_pass_works(tmp_path, monkeypatch):
    source, test = re.findall(
        r"```python\n(.*?)```", (DOCS / "adding-a-pass.md").read_text(encoding="utf-8"), re.DOTALL
    )
    name = "dvexport.passes.drop_full_masks"
    path = tmp_path / "drop_full_masks.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    scope: dict[str, object] = {}
    exec(compile(test, "docs/adding-a-pass.md", "exec"), scope)
    scope["test_a_full_mask_is_dropped"]()  # type: ignore[operator]


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name)
def test_links_and_files_named_exist(path):
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    missing = [link for link in links if not (path.parent / link).exists()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    named = re.findall(r"`((?:dvexport|models|passes|targets)/[\w/.-]*\w\.(?:py|toml|j2))`", prose)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_results_of_the_readme_are_those_of_the_training_document():
    text, _, _ = (DOCS / "training.md").read_text(encoding="utf-8").partition("### After export")
    rows, lines = re.findall(r"^\| `(\w+_motion\w*)` \|", text, re.MULTILINE), text.splitlines()
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 4
    for name in rows:
        measured = next(line for line in lines if line.startswith(f"| `{name}` |")).split(" | ")
        stated = next(line for line in readme if line.startswith(f"| `{name}`")).strip("| ").split(" | ")
        assert stated[1].removesuffix(" (chance)") == measured[2]
        assert stated[2:] == measured[3:5]


def test_every_pass_of_the_pipeline_is_in_the_design():
    """A pass nobody described is a pass nobody can find."""
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    tables = [ROOT / "passes" / "pipeline.py", *(ROOT / "targets").glob("*/passes.py")]
    lines = "\n".join(path.read_text(encoding="utf-8") for path in tables)
    found = re.findall(r"from dvexport\.(?:passes|targets\.\w+\.rewrites)(?:\.tiles)?\.(\w+) import", lines)
    modules = set(found) - {"lowerings", "pipeline"}  # these hold no pass
    assert {"simplify", "lower_tiles", "windows", "patches"} <= modules
    assert not {name for name in modules if f"`{name}`" not in text}
