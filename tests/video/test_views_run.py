"""`run` on several views and on a camera, by a session that tells what it was given."""

import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar

import av
import numpy as np
import pytest

from dvexport.bundle.archive import Bundle
from dvexport.cli import main
from dvexport.errors import UsageError
from dvexport.models import zoo
from dvexport.ports import Output
from dvexport.run import run as run_module
from dvexport.run.session import Step
from dvexport.video import clips
from dvexport.video.clips import write_clip
from dvexport.video.preprocess import Preprocess

RECIPE = {"size": (32, 32), "resize": 32, "frames": 2, "sampling": "dense", "clips": 2}


class Session:
    """Logits (4 * grey level, 0): the brighter the frames, the surer it is of class 0."""

    inputs: ClassVar = {"frames": None}

    def __init__(self, mode, whole_clip=False):
        self.mode, self.whole_clip = mode, whole_clip

    def step(self, feeds):
        return Step({"logits": np.array([float(feeds["frames"].mean()) * 4, 0.0])}, {})

    def run_clip(self, feeds):
        steps = [self.step({"frames": frame}) for frame in feeds["frames"]]
        return steps[-1:] if self.whole_clip else steps


def described(preprocess):
    """A manifest of a classifier, as far as `run` reads it."""
    return SimpleNamespace(preprocess=preprocess, declared_outputs=[Output("logits", "logits", ("bright", "dark"))])


@pytest.fixture
def opened(monkeypatch, tmp_path):
    levels = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None, None] * 10, (20, 32, 48, 3))
    write_clip(tmp_path / "v.mp4", levels, 10)

    def run(mode, whole_clip=False, clip=None, limit=None, tell=None, **preprocess):
        monkeypatch.setattr(run_module, "open_session", lambda *_, **__: Session(mode, whole_clip))
        manifest = described(Preprocess(mean=(0, 0, 0), std=(1, 1, 1), **preprocess))
        return run_module.run(SimpleNamespace(manifest=manifest), clip or tmp_path / "v.mp4", limit=limit, tell=tell)

    return run


def sure_of_bright(level):
    return 1 / (1 + np.exp(-4 * level / 255))


@pytest.mark.parametrize("whole_clip", [True, False])
@pytest.mark.parametrize("crops", [1, 3])
def test_probabilities_of_the_views_are_averaged(opened, whole_clip, crops):
    result = opened("clip", whole_clip, crops=crops, **RECIPE)
    # 19 starts: the clips begin at 4 and 14, and end one frame later.
    wanted = (sure_of_bright(50) + sure_of_bright(150)) / 2
    assert result.top[0][0] == "bright"
    assert result.top[0][1] == pytest.approx(wanted, abs=5e-3)
    assert len(result.frames) == 1
    assert result.frames[0].time == pytest.approx(1.5)


def test_one_view_gives_a_prediction_for_each_frame(opened):
    result = opened("clip", **{**RECIPE, "sampling": "uniform", "clips": 1})
    assert [frame.time for frame in result.frames] == pytest.approx([0.5, 1.5])
    assert result.top[0][1] == pytest.approx(sure_of_bright(150), abs=5e-3)


def test_a_stream_stops_at_its_limit_and_a_clip_has_none(opened):
    assert len(opened("stream", limit=3, **RECIPE).frames) == 3
    with pytest.raises(UsageError, match="fixed length"):
        opened("clip", limit=3, **RECIPE)


def camera(path, interrupted):
    decode = clips.decode

    def frames(source, **options):
        yield from decode(path if str(source) == "camera:0" else source, **options)
        if interrupted:
            raise KeyboardInterrupt

    return frames


def test_a_camera_ends_with_control_c_and_keeps_what_it_saw(opened, monkeypatch, tmp_path):
    monkeypatch.setattr(clips, "decode", camera(tmp_path / "v.mp4", interrupted=True))
    seen = []
    result = opened("stream", clip="camera:0", tell=seen.append, **RECIPE)
    assert len(result.frames) == 20
    assert seen == result.frames
    assert result.top[0][1] == pytest.approx(sure_of_bright(190), abs=5e-3)
    with pytest.raises(KeyboardInterrupt):
        opened("stream", **RECIPE)


def test_transformers_have_their_recipe_by_name():
    assert zoo.create("vit_small", views="kinetics").preprocess == Preprocess(
        resize=224, frames=16, sampling="dense_to_ends", stride=4, clips=5, crops=3
    )
    assert zoo.create("video_swin_tiny", views="kinetics").preprocess == Preprocess(
        resize=224, frames=32, sampling="dense", stride=2, clips=4, crops=3
    )
    assert zoo.create("vit_small").preprocess == Preprocess(resize=256, frames=16)


def test_weights_that_ship_keep_their_input_and_take_a_recipe():
    plain = zoo.create("vit_motion").preprocess
    recipe = zoo.create("vit_motion", views="kinetics").preprocess
    assert (recipe.mean, recipe.std, recipe.frames) == (plain.mean, plain.std, plain.frames)
    assert (recipe.stride, recipe.clips, recipe.crops) == (4, 5, 3)
    assert (plain.stride, plain.clips, plain.crops) == (1, 1, 1)


@pytest.fixture
def command(monkeypatch, capsys):
    manifest = described(Preprocess(size=(32, 32), resize=32, mean=(0, 0, 0), std=(1, 1, 1)))
    monkeypatch.setattr(Bundle, "open", lambda *_, **__: SimpleNamespace(manifest=manifest))
    monkeypatch.setattr(run_module, "open_session", lambda *_, **__: Session("stream"))

    def call(*words):
        with pytest.raises(SystemExit) as left:
            main(["run", "b.dvx", *words])
        return left.value.code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("clip", ["/dev/zero", "camera:98", "nowhere.mp4", "."])
def test_the_command_line_ends_with_one_error(clip, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("--clip", clip)
    assert code == 2
    assert out == ""
    assert err.count("where:") == 1
    assert "Traceback" not in err


def test_a_camera_is_shown_frame_by_frame(command, monkeypatch, tmp_path):
    write_clip(tmp_path / "v.mp4", np.full((8, 32, 32, 3), 250, np.uint8), 10)
    monkeypatch.setattr(clips, "decode", camera(tmp_path / "v.mp4", interrupted=False))
    code, out, _ = command("--clip", "camera:0", "--frames", "3")
    assert code == 0
    assert out.count(" s ") == 3
    assert "0.20 s" in out
    assert command("--clip", "camera:0", "--frames", "0")[0] == 2


def test_without_logging_set_up_a_warning_is_one_line_of_standard_error(tmp_path):
    path = tmp_path / "v.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 250, np.uint8), "rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes()[:9000])
    read = "import sys; from dvexport.video.clips import *; from dvexport.video.preprocess import Preprocess\n"
    read += "print(len(read_clip(sys.argv[1], Preprocess(frames=2)).frames))"
    done = subprocess.run([sys.executable, "-c", read, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"
    assert done.stderr.startswith("warning: the video is cut off or damaged")
    assert done.stderr.count("\n") == 1
