"""Every command and example of the README runs, in order, in one folder, as a reader would run them."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from dvexport.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line for language, block in BLOCKS if not language for line in block.splitlines() if line.startswith("dvexport ")
]
LISTINGS = [line for line in COMMANDS if re.match(r"dvexport (models|targets)\b", line)]
SHIPPED = "dstep_motion_d40"
CLIPS = sorted((ROOT / "models" / "clips").glob("*.mp4"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with what the README calls the reader's own: a checkpoint in the official layout, a clip."""
    import torch

    from dvexport.models import zoo

    place = tmp_path_factory.mktemp("readme")
    shutil.copy(CLIPS[0], place / "MY.mp4")
    torch.manual_seed(0)
    model = zoo.create("dstep_resnet18", classes=5)
    torch.save(model.state_dict(), place / "MY.pth.tar")
    transformers = pytest.importorskip("transformers", reason="writes the directory that a command of the README reads")
    small = {"image_size": 160, "patch_size": 16, "num_frames": 16, "hidden_size": 24, "intermediate_size": 48}
    layers = {"num_hidden_layers": 3, "num_attention_heads": 3, "num_labels": 5}
    config = transformers.VideoMAEConfig(**small, **layers)
    transformers.VideoMAEForVideoClassification(config).save_pretrained(place / "MY_VIDEOMAE")
    side = {"height": 160, "width": 160}
    about = {"size": {"shortest_edge": 180}, "crop_size": side, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (place / "MY_VIDEOMAE" / "preprocessor_config.json").write_text(json.dumps(about), encoding="utf-8")
    return place


@dataclass(frozen=True)
class Done:
    """What a command gave: exit code, output, error text."""

    code: int
    output: str
    error: str


def _start(command: str, folder: Path) -> Done:
    """Run a command in a process of its own, as a reader does."""
    start = [sys.executable, "-c", "from dvexport.cli import main; main()"]
    done = subprocess.run(
        [*start, *_words(command)], cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def _call(command: str, folder: Path) -> Done:
    """Run a command in this process, which has imported all that is slow to import."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        with pytest.raises(SystemExit) as left:
            main(_words(command))
    return Done(left.value.code, out.getvalue(), err.getvalue())


def _words(command: str) -> list[str]:
    program, *words = shlex.split(command)
    assert program == "dvexport"
    return words


@pytest.mark.parametrize("command", LISTINGS)
def test_a_listing_runs(command, tmp_path):
    done = _start(command, tmp_path)
    assert done.code == 0, done.error
    assert done.output.strip()


@pytest.mark.slow
def test_every_other_command_runs_in_order(folder):
    """The first of each kind in a process of its own, which takes some seconds to begin; the others in this one."""
    outputs, begun = set(), set()
    for command in (line for line in COMMANDS if line not in LISTINGS):
        kind = _words(command)[0]
        done = (_call if kind in begun else _start)(command, folder)
        begun.add(kind)
        assert done.code == 0, f"{command}\n{done.error}"
        outputs |= set(re.findall(r"(?:-o|--html|--json) (\S+)", command))
    assert outputs == {"my.dvx", "report.html", "motion.dvx", "forced.json", "native.dvx", "pi.dvx", "mae.dvx"}
    assert begun == {"export", "verify", "run", "profile", "inspect"}
    assert all((folder / name).stat().st_size > 0 for name in outputs)


@pytest.mark.slow
def test_the_python_example_runs(folder, monkeypatch, capsys):
    (example,) = (block for language, block in BLOCKS if language == "python")
    monkeypatch.chdir(folder)
    exec(compile(example, "README.md", "exec"), {})
    assert re.search(r"\d\.\d\d s  \w+", capsys.readouterr().out)


def test_every_make_target_named_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([\w-]+)", README)) - {"are"}
    assert {"demo", "test", "test-fast", "bench", "lint", "clean"} <= named <= targets


def test_every_command_of_the_program_is_in_the_table():
    from dvexport.cli import cli

    assert set(re.findall(r"^\| `dvexport (\w+)", README, re.MULTILINE)) == set(cli.commands)


def test_what_the_demo_names_exists():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    settings = dict(re.findall(r"^(\w+) \?= (\S+)$", text, re.MULTILINE))
    assert settings["MODEL"] == SHIPPED
    assert (ROOT / "models" / "weights" / f"{settings['MODEL']}.safetensors").is_file()
    assert ROOT / settings["CLIP"] in CLIPS
