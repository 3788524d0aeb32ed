"""`dvexport` on modules that are no classifiers: described by options, run on a video, pictures and arrays written."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from dvexport.cli import main
from dvexport.ports import Output
from dvexport.run.pictures import colour, draw_boxes, draw_map
from dvexport.video.clips import write_clip
from tests.support.task_models import CLIP, FLOW, SIZE, clip_feeds

SEGMENTER = (
    "tests.support.task_models:segmenter", "--input", "frames=3x48x64", "--kind", "masks=map",
    "--preprocess", "imagenet", "--preprocess", f"frames={CLIP}",
)  # fmt: skip
DETECTOR = (
    "tests.support.task_models:detector", "--input", "frames=3x48x64", "--input", "flow=2x24x32",
    "--kind", "boxes=boxes", "--kind", "scores=scores", "--preprocess", "imagenet", "--preprocess", f"frames={CLIP}",
)  # fmt: skip


class Outcome(NamedTuple):
    exit_code: int
    printed: str
    output: str


def cli(*arguments) -> Outcome:
    """Run a command: its exit code, what it printed, and that with the errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return Outcome(left.value.code, out.getvalue(), out.getvalue() + err.getvalue())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A clip, flow for it, labels, and the bundles of both models, exported by the command."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    write_clip(folder / "clip.mp4", rng.integers(0, 256, (CLIP, *SIZE, 3), np.uint8), 25)
    np.savez(folder / "flow.npz", flow=clip_feeds(flow=True)["flow"])
    (folder / "labels.txt").write_text("nothing\nhand\ncup\n", encoding="utf-8")
    labels = ("--set", f"labels={folder / 'labels.txt'}")
    calibrate = ("--calibrate", folder / "clip.mp4", "--inputs", folder / "flow.npz")
    for name, words in (("segmenter", SEGMENTER), ("detector", (*DETECTOR, *calibrate))):
        result = cli("export", *words, *labels, "--backend", "onnx", "-o", folder / f"{name}.dvx")
        assert result.exit_code == 0, result.output
    return folder


def test_a_factory_s_module_is_verified_by_the_bundle_s_word_for_its_inputs(files):
    clip = ("--clip", files / "clip.mp4")
    for name, more in (("segmenter", ()), ("detector", ("--inputs", files / "flow.npz"))):
        model = ("--model", f"tests.support.task_models:{name}")
        result = cli("verify", files / f"{name}.dvx", *model, *clip, *more)
        assert result.exit_code == 0, result.output
        assert "PyTorch: " in result.output and "note:" not in result.output


def test_run_prints_a_table_and_writes_arrays_and_pictures_of_maps(files, tmp_path):
    arrays, pictures = tmp_path / "out.npz", tmp_path / "pictures"
    result = cli(
        "run", files / "segmenter.dvx", "--clip", files / "clip.mp4", "--output", arrays, "--pictures", pictures
    )
    assert result.exit_code == 0, result.output
    assert "masks" in result.output and f"{CLIP}x3x48x64" in result.output
    with np.load(arrays) as stored:
        assert {name: stored[name].shape for name in stored.files} == {
            "masks": (CLIP, 3, *SIZE), "features": (CLIP, 16),
        }  # fmt: skip
        kinds = stored["masks"].argmax(1)
    assert sorted(path.name for path in pictures.glob("*.png")) == [f"masks-000{i}.png" for i in range(CLIP)]
    assert (pictures / "masks.txt").read_text(encoding="utf-8").splitlines()[1].endswith(" hand")
    with Image.open(pictures / "masks-0000.png") as picture:
        assert picture.size == (SIZE[1], SIZE[0])
    assert kinds.shape == (CLIP, *SIZE)


def test_run_draws_boxes_and_takes_inputs_beside_the_clip(files, tmp_path):
    clip = ("--clip", files / "clip.mp4")
    words = ("run", files / "detector.dvx", *clip, "--inputs", files / "flow.npz")
    result = cli(*words, "--pictures", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    told = {one["name"]: one for one in json.loads(result.printed)["outputs"]}
    assert told["boxes"]["kind"] == "boxes" and told["boxes"]["shape"] == [CLIP, 12, 4]
    assert 0 <= told["scores"]["min"] <= told["scores"]["mean"] <= told["scores"]["max"] <= 1
    assert len(list(tmp_path.glob("boxes-*.png"))) == CLIP


def test_profile_takes_inputs_beside_the_clip(files, tmp_path):
    words = ("profile", files / "detector.dvx", "--clip", files / "clip.mp4", "--runs", 1, "--warmup", 0)
    written = ("--json", tmp_path / "a.json", "--html", tmp_path / "a.html")
    result = cli(*words, "--inputs", files / "flow.npz", *written)
    assert result.exit_code == 0, result.output
    steps = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["steps"]
    assert [step["label"] for step in steps] == [None] * CLIP


@pytest.mark.parametrize("command", ["run", "verify", "profile"])
def test_a_missing_input_says_which_and_how(files, command, tmp_path):
    clip = ("--clip", files / "clip.mp4")
    result = cli(command, files / "detector.dvx", *clip)
    assert result.exit_code == 2
    assert "needs the input 'flow'" in result.output and "--inputs FILE.npz" in result.output
    np.savez(tmp_path / "short.npz", flow=np.zeros((2, *FLOW), np.float32))
    result = cli(command, files / "detector.dvx", *clip, "--inputs", tmp_path / "short.npz")
    assert result.exit_code == 2 and f"'flow' must have {CLIP} frames" in result.output
    np.savez(tmp_path / "more.npz", flow=np.zeros((CLIP, *FLOW), np.float32), depth=np.zeros(CLIP))
    result = cli(command, files / "detector.dvx", *clip, "--inputs", tmp_path / "more.npz")
    assert result.exit_code == 2 and "'depth' is no input to give" in result.output
    (tmp_path / "none.npz").write_bytes(b"no archive")
    result = cli(command, files / "detector.dvx", *clip, "--inputs", tmp_path / "none.npz")
    assert result.exit_code == 2 and "the inputs can't be read" in result.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (SEGMENTER[:1], "--input frames=3xHxW"),
        ((*SEGMENTER[:1], "--kind", "masks=map"), "described by its inputs"),
        ((*SEGMENTER[:3],), "nothing tells how the model's frames"),
        ((*SEGMENTER[:2], "frames=3x48xa"), "--input takes NAME=SIZES"),
        ((*SEGMENTER[:4], "masks=picture"), "unknown kind of output 'picture'"),
        ((*SEGMENTER[:5], "--preprocess", "mean=0,0,0"), "has to tell the normalisation"),
        (("tsn_resnet18", *SEGMENTER[1:]), "says itself what it takes"),
    ],
)
def test_options_that_do_not_describe_a_module(words, says, tmp_path):
    result = cli("export", *words, "--backend", "onnx", "-o", tmp_path / "a.dvx")
    assert result.exit_code == 2 and says in result.output, result.output
    assert not (tmp_path / "a.dvx").exists()


def test_pictures_show_where_a_class_is_and_which_boxes_are_sure():
    image = np.full((8, 8, 3), 100, np.uint8)
    scores = np.zeros((2, 4, 4), np.float32)
    scores[1, :2] = 1
    drawn = draw_map(image, scores)
    assert (drawn[4:] == 100).all()
    np.testing.assert_allclose(drawn[0, 0], (np.array(colour(1)) + 100) / 2, atol=1)
    image = np.full((40, 60, 3), 100, np.uint8)
    boxes = np.array([[10, 20, 50, 35], [2, 2, 57, 37]], np.float32)
    drawn = draw_boxes(image, boxes, np.array([[0.1, 0.2], [0.1, 0.9]], np.float32))
    assert tuple(drawn[37, 30]) == colour(2) and (drawn[35, 30] == 100).all()
    assert tuple(draw_boxes(image, boxes, None)[35, 30]) == colour(1)


def test_nothing_to_draw_is_said(files, tmp_path):
    assert Output("a").kind == "array"
    words = ("export", *SEGMENTER[:3], *SEGMENTER[5:], "--backend", "onnx", "-o", tmp_path / "plain.dvx")
    assert cli(*words).exit_code == 0
    result = cli("run", tmp_path / "plain.dvx", "--clip", files / "clip.mp4", "--pictures", tmp_path / "p")
    assert result.exit_code == 2 and "nothing to draw" in result.output


def test_the_guide_s_tasks_are_exported_and_run(tmp_path, monkeypatch):
    guide = (Path(__file__).parents[2] / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
    tasks, script = re.findall(r"```python\n(.*?)```", guide, flags=re.S)[1:3]
    (tmp_path / "my_tasks.py").write_text(tasks, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(script, "guide", "exec"), {"torch": torch})
    assert printed.getvalue() == "(12, 4) (12, 3)\n"
    command = next(line for line in guide.splitlines() if line.startswith("dvexport export my_tasks"))
    result = cli(*shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    assert cli("verify", "detector.dvx", "--model", "my_tasks:detector").exit_code == 0
