"""What tests of commands share: the command line as a function, and one real bundle that it made."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import shared, small_model

from dvexport.cli import main
from dvexport.targets.tvm.build import cache
from dvexport.video.clips import write_clip

Call = Callable[..., tuple[int, str, str]]

MODEL = "dstep_resnet18"


@dataclass(frozen=True)
class Made:
    """A bundle that the command line made: its file, and what was said."""

    path: Path
    output: str
    progress: str


@pytest.fixture
def call(capsys) -> Call:
    """Return a function that runs the command line and returns exit code, output and error text."""

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return run


@pytest.fixture(scope="session")
def clip() -> Path:
    """A video of noise: 12 frames of 80x80."""

    def write(path: Path) -> None:
        frames = np.random.default_rng(3).integers(0, 255, (12, 10, 10, 3), np.uint8)
        write_clip(path, frames.repeat(8, 1).repeat(8, 2), 12.0)

    return shared("noise.mp4", write)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """Weights of the small model, as its authors would save them."""
    return shared("small.pth", lambda path: torch.save(small_model(MODEL).state_dict(), path))


@pytest.fixture(scope="session")
def made(checkpoint, clip) -> Made:
    """The small model, exported with every option that export has."""

    def export(path: Path) -> None:
        options = [f"--set={pair}" for pair in ("width=0.25", "size=64", "frames=5", "classes=12", "shift=none")]
        options += ["--assume-defaults", "--target=rk3588", "--backend=onnx", "--mode=stream"]
        options += ["--lowering=layer1.0=masked", f"--calibrate={clip}", f"--checkpoint={checkpoint}"]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
            main(["export", MODEL, *options, "-o", str(path)])
        assert left.value.code == 0, err.getvalue()
        path.with_suffix(".out").write_text(out.getvalue())
        path.with_suffix(".err").write_text(err.getvalue())

    path = shared("cli.dvx", export)
    return Made(path, *(path.with_suffix(suffix).read_text() for suffix in (".out", ".err")))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder for the cache that does not exist yet, and a process that has said and seen nothing."""
    tmp_path.chmod(0o755)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    for name, nothing in (("_said", set()), ("_tidied", set()), ("_seen", {})):
        monkeypatch.setattr(cache, name, nothing)
    return tmp_path / "cache"
