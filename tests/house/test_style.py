"""House rules that no linter knows."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("dvexport", "models", "passes", "targets")
TEXT = {
    "",
    ".cfg",
    ".css",
    ".html",
    ".j2",
    ".json",
    ".md",
    ".py",
    ".sh",
    ".svg",
    ".toml",
    ".txt",
    ".yaml",
    ".yml",
}

# In pieces, so that this file does not contain what it forbids.
MACHINE_PATHS = re.compile(
    r"(?<![\w.])/(?:" + "|".join(["ho" + "me", "ro" + "ot", "wo" + "rk", "Us" + "ers"]) + r")/\w"
)
SHARED_FOLDER = ".." + "/shared"
REGISTRY_HOSTS = re.compile(
    "|".join([r"pypi\." + "org", r"pythonhosted\." + "org", r"download\.py" + "torch", r"crates\." + "io"])
)

MOST_LINES = 450
MOST_FILES = 20


def _tracked() -> list[Path]:
    """Files that are in git or about to be; a source archive without git has every file looked at."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listing.returncode:
        return [path for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts]
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def _modules() -> list[Path]:
    return [path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_modules_are_found():
    found = {_name(path) for path in _modules()}
    assert {"dvexport/gates.py", "models/zoo.py", "passes/split_paths.py", "targets/catalogue.py"} <= found


@pytest.mark.parametrize(
    ("text", "forbidden"),
    [("see /ho" + "me/someone/x", True), ("/wo" + "rk/main", True), ("layers/wo" + "rk/main", False)],
)
def test_machine_paths_are_recognised(text, forbidden):
    assert bool(MACHINE_PATHS.search(text)) == forbidden


def test_no_file_speaks_of_one_machine():
    found = []
    for path in _tracked():
        if path.suffix not in TEXT:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if MACHINE_PATHS.search(line) or SHARED_FOLDER in line or REGISTRY_HOSTS.search(line):
                found.append(f"{_name(path)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", _modules(), ids=_name)
def test_a_module_says_what_it_is_and_what_it_offers(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.name == "__init__.py" and not tree.body:
        return
    assert ast.get_docstring(tree), "no docstring"
    assigned = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    assert path.name in ("__init__.py", "__main__.py") or "__all__" in assigned, "no __all__"
    assert len(path.read_text(encoding="utf-8").splitlines()) < MOST_LINES, "look for the second idea in it"


TESTS = [path for folder in ("tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", TESTS, ids=_name)
def test_a_module_of_tests_says_what_it_shows_and_is_short(path):
    text = path.read_text(encoding="utf-8")
    assert not text or ast.get_docstring(ast.parse(text)), "no docstring"
    assert len(text.splitlines()) < MOST_LINES, "look for the second idea in it"


def test_no_folder_is_a_crowd():
    """Among so many files side by side some belong together; each pass is a file."""
    folders = Counter(path.parent for path in [*_modules(), *TESTS])
    assert {name: count for name, count in folders.items() if count > MOST_FILES and name.name != "passes"} == {}
    assert len(folders) > 30


def test_what_tests_share_is_in_no_test_module():
    """A test module can be split, renamed or removed without breaking another."""
    paths = sorted((ROOT / "tests").rglob("*.py"))
    wrong = [f"{_name(path)} imports {name}" for path in paths for name in _imports(path) if name.startswith("test_")]
    assert paths
    assert not wrong, "\n".join(wrong)


# A sentence begins a text or follows a full stop or a blank line, after what marks an item, a heading or a cell.
_BARE_OF = re.compile(r"(?:\A|[.!?][)`*]* |\n *\n|\n *(?:[-*#|>]+|\d+\.) )\s*(?:[-*#|>]+ +)?Of\s")


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("Of the largest output.", True),
        ("It is read. Of equal scores one wins.", True),
        ("- Of two", True),
        ("One.\n\nOf two", True),
        ("Half of it. The best of Of", False),
        ("Often", False),
    ],
)
def test_a_sentence_that_begins_with_of_is_recognised(text, bare):
    assert bool(_BARE_OF.search(text)) == bare


def test_no_sentence_begins_with_a_bare_of():
    """A subject comes first: in docstrings, comments and documents."""
    documents = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = [(path, _unwrapped(path.read_text(encoding="utf-8"))) for path in documents]
    texts += [(path, text) for path in [*_modules(), *TESTS] for text in _prose(path)]
    wrong = [f"{_name(path)}: {found[0]!r}" for path, text in texts if (found := _BARE_OF.search(text))]
    assert len(texts) > 1000
    assert not wrong, "\n".join(wrong)


def _prose(path: Path) -> list[str]:
    """Return the comments of a module, and its strings that stand alone: its docstrings."""
    source = path.read_text(encoding="utf-8")
    found = [
        node.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found += [token.string.lstrip("#: ") for token in tokens if token.type == tokenize.COMMENT]
    return [_unwrapped(text) for text in found]


def _unwrapped(text: str) -> str:
    """Join the lines of a paragraph, so that a full stop at the end of a line is followed by a space."""
    return re.sub(r"(?<=[.!?])\n *(?=\w)", " ", text)


def _imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found
