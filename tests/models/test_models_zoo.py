"""The zoo: names, settings, weights, and the errors of those who ask for what is not there."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from dvexport.errors import CheckpointError, UsageError
from dvexport.models import zoo
from dvexport.models.base import VideoModel
from dvexport.models.checkpoints.checkpoint import save_checkpoint
from dvexport.models.config import MobileNetConfig, ResNetConfig
from dvexport.models.settings import parse_settings

ARCHITECTURES = [name for name in zoo.names() if zoo.describe(name).weights is None]


def test_names_and_descriptions_need_no_torch():
    code = (
        "import sys; from dvexport.models import zoo\n"
        "[zoo.describe(name) for name in zoo.names()]\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


SMALL = {
    "resnet": {"width": 0.125},
    "mobilenet": {"width": 0.125},
    "vit": {"depth": 2, "embed_dim": 16, "heads": 2},
    "video_swin": {"depths": "1,1,1,1", "embed_dim": 8, "heads": "1,1,2,2"},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_model_runs(name):
    info = zoo.describe(name)
    model = zoo.create(name, size=32, frames=2, classes=3, **SMALL[info.family])
    with torch.no_grad():
        result = model(torch.zeros(2, 3, 32, 32))
    assert result.shape == (1 if model.whole_clip else 2, 3)
    assert model.preprocess.size == (32, 32)
    assert model.preprocess.frames == 2
    assert len(model.labels) == 3
    assert not model.training
    assert model.causal == (not model.whole_clip and info.options["shift"] != "bidirectional")


def test_shipped_weights_load_and_know_their_labels():
    for name in zoo.names():
        info = zoo.describe(name)
        if info.weights is not None:
            model = zoo.create(name)
            assert model.labels == info.labels
            assert 0 < info.accuracy <= 1


def test_settings_are_parsed_as_on_the_command_line():
    cases = {
        "depth": ("50", 50),
        "size": ("224x160", (224, 160)),
        "enabled_stages": ("2,3", (2, 3)),
        "history": ("no", False),
        "width": ("0.5", 0.5),
        "shift": ("online", "online"),
    }
    texts = {name: text for name, (text, _) in cases.items()}
    assert parse_settings(ResNetConfig, texts) == {name: value for name, (_, value) in cases.items()}
    assert parse_settings(ResNetConfig, {"size": 112})["size"] == (112, 112)
    assert parse_settings(ResNetConfig, {"enabled_stages": 3})["enabled_stages"] == (3,)


def test_settings_survive_json():
    import json

    config = ResNetConfig(depth=50, size=(96, 128), enabled_stages=(3,), history=False)
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    assert ResNetConfig(**parse_settings(ResNetConfig, plain)) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shfit": "online"}, "did you mean shift"),
        ({"shift": "bidirectonal"}, "did you mean bidirectional"),
        ({"depth": 34}, "unknown value of depth '34'"),
        ({"classes": "many"}, "classes can't be 'many'"),
        ({"classes": 2.5}, "classes can't be '2.5'"),
        ({"history": "maybe"}, "history can't be 'maybe'"),
        ({"size": "1,2,3"}, "size can't be '1,2,3'"),
        ({"frames": 0}, "frames=0"),
        ({"shift_div": 1}, "shift_div=1"),
        ({"width": -1}, "width=-1"),
        ({"enabled_stages": "4"}, "enabled_stages"),
        ({"hidden": 0}, "hidden units"),
    ],
)
def test_unfit_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        zoo.create("dstep_resnet18", **settings)


def test_unknown_model_suggests_the_nearest():
    with pytest.raises(UsageError, match=r"did you mean.*tsm_resnet50"):
        zoo.create("tsm_resnet_50")


def test_options_of_another_family_are_unknown():
    with pytest.raises(UsageError, match="unknown option 'depth'"):
        zoo.create("tsm_mobilenetv2", depth=18)
    assert MobileNetConfig(shift="online").causal


def saved(tmp_path, name="dstep_resnet18", **settings):
    model = zoo.create(name, width=0.125, size=64, classes=3, hidden=8, frames=4, **settings)
    model.set_labels(["left", "right", "still"])
    model.preprocess = dataclasses.replace(model.preprocess, frame_rate=7.5)
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, model, architecture=name, accuracy=0.75)
    return model, path


def test_own_checkpoint_says_everything(tmp_path):
    model, path = saved(tmp_path)
    loaded = zoo.create("dstep_resnet18", path)
    assert loaded.config == model.config
    assert loaded.labels == ["left", "right", "still"]
    assert loaded.preprocess == model.preprocess
    frames = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(frames), model(frames))
    assert list(tmp_path.iterdir()) == [path]


def test_settings_outrank_an_own_checkpoint(tmp_path):
    _, path = saved(tmp_path)
    model = zoo.create("dstep_resnet18", path, size="96x64", frames="6", sampling="official")
    assert model.config.sampling == "official"
    assert (model.preprocess.size, model.preprocess.frames) == ((96, 64), 6)
    assert model.preprocess.frame_rate == 7.5


def test_checkpoint_that_can_not_be_written_leaves_nothing(tmp_path):
    (tmp_path / "taken.safetensors").mkdir()
    model = zoo.create("tsn_resnet18", width=0.125, classes=3)
    for path, why in ((tmp_path / "taken.safetensors", "it is a folder"), (tmp_path / "no" / "x", "does not exist")):
        with pytest.raises(UsageError, match=why):
            save_checkpoint(path, model, architecture="tsn_resnet18")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.safetensors"]


def test_own_checkpoint_of_another_model(tmp_path):
    _, path = saved(tmp_path)
    with pytest.raises(CheckpointError, match="use dstep_resnet18"):
        zoo.create("adafuse_resnet18", path)


def test_shared_policies_are_saved_once(tmp_path):
    from safetensors.torch import load_file

    _, path = saved(tmp_path)
    keys = load_file(path)
    assert "layer1.0.gates.policy.fc0.weight" in keys
    assert "layer1.1.gates.policy.fc0.weight" not in keys


def test_shipped_models_are_found_in_the_weights_folder(tmp_path, monkeypatch):
    _, path = saved(tmp_path)
    monkeypatch.setattr(zoo, "weights_folder", lambda: tmp_path)
    info = zoo.describe("own")
    assert (info.architecture, info.accuracy, info.labels[0]) == ("dstep_resnet18", 0.75, "left")
    assert zoo.names()[0] == "own"
    assert zoo.create("own").name == "own"
    with pytest.raises(UsageError, match="weights of its own"):
        zoo.create("own", path)


FACTORY = """
from torch import nn
from dvexport.models.base import VideoModel, imagenet_preprocess
from dvexport.models.config import ResNetConfig

class Tiny(VideoModel):
    def __init__(self, config):
        super().__init__(name="tiny", config=config, causal=True,
                         preprocess=imagenet_preprocess((32, 32), 2), labels=["a", "b"])
        self.fc = nn.Linear(3, 2)
    def per_frame_logits(self, x):
        return self.fc(x.mean((2, 3)))

def make(classes=2, **settings):
    return Tiny(ResNetConfig(classes=classes))

def wrong():
    return nn.Linear(3, 2)
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "my_factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_factory", raising=False)
    return tmp_path


def test_own_factory_from_the_working_folder(factory):
    model = zoo.create("my_factory:make", classes="2", other="text")
    assert isinstance(model, VideoModel)
    assert str(factory) not in sys.path
    torch.save(model.state_dict(), factory / "w.pth")
    again = zoo.create("my_factory:make", factory / "w.pth")
    assert torch.equal(again.fc.weight, model.fc.weight)
    torch.save({"fc.weight": torch.zeros(2, 3), "other": torch.zeros(1)}, factory / "w.pth")
    with pytest.raises(CheckpointError, match=r"1 missing: fc.bias; 1 unexpected: other"):
        zoo.create("my_factory:make", factory / "w.pth")


@pytest.mark.parametrize("name", ["my_factory:absent", "no_such_module_here:make", ":make"])
def test_factory_that_can_not_be_found(factory, name):
    with pytest.raises(UsageError, match="can't find the model factory"):
        zoo.create(name)


def test_factory_of_something_else(factory):
    with pytest.raises(UsageError, match="nothing tells what a Linear takes"):
        zoo.create("my_factory:wrong")


def test_factory_that_fails_is_named_by_its_line(factory):
    (factory / "my_failing.py").write_text("def make(classes=2):\n    raise ValueError(f'not {classes}')\n")
    with pytest.raises(UsageError, match="failed") as error:
        zoo.create("my_failing:make", classes="3")
    assert (error.value.where, error.value.why) == (f"{factory / 'my_failing.py'}:2", "ValueError: not 3")
    with pytest.raises(UsageError, match="options don't fit") as error:
        zoo.create("my_failing:make", clases="3")
    assert error.value.where == "make(classes=2)"
    assert "clases" in error.value.why
    (factory / "my_broken.py").write_text("def make(:\n")
    with pytest.raises(UsageError, match="failed") as error:
        zoo.create("my_broken:make")
    assert error.value.where == f"{factory / 'my_broken.py'}:1"
    assert error.value.why.startswith("SyntaxError")


def test_labels_must_fit():
    model = zoo.create("tsn_resnet18", width=0.125, classes=3)
    with pytest.raises(UsageError, match="2 labels for a model of 3 classes"):
        model.set_labels(["a", "b"])


def test_labels_from_a_file_or_a_list(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("left\nright\n\nstill\n")
    settings = {"width": 0.125, "classes": 3}
    assert zoo.create("tsn_resnet18", labels=str(path), **settings).labels == ["left", "right", "still"]
    assert zoo.create("tsn_resnet18", labels=["a", "b", "c"], **settings).labels == ["a", "b", "c"]
    with pytest.raises(UsageError, match="can't read the labels"):
        zoo.create("tsn_resnet18", labels=tmp_path / "absent.txt", **settings)


@pytest.mark.parametrize(
    ("name", "settings", "what"),
    [
        ("tsn_resnet18", {"frames": 99999999999999999999}, "frames=99999999999999999999 is out of range"),
        ("tsn_resnet18", {"classes": 10**12}, "classes=1000000000000 is out of range"),
        ("tsn_resnet18", {"size": "8193x8"}, "size=8193x8 is out of range"),
        ("tsn_resnet18", {"width": "nan"}, "width=nan is out of range"),
        ("tsn_resnet18", {"dropout": 1.5}, "dropout=1.5 is out of range"),
        ("adafuse_resnet18", {"enabled_stages": "0,4"}, "enabled_stages=0x4 is out of range"),
        ("adafuse_resnet18", {"hidden": 0}, "hidden=0 is out of range"),
        ("adafuse_resnet18", {"tau": 0}, "tau=0.0 is out of range"),
        ("vit_small", {"norm_eps": "inf"}, "norm_eps=inf is out of range"),
        ("vit_small", {"sta.groups": "8,4,0"}, "sta.groups=8x4x0 is out of range"),
        ("vit_small", {"sta.seed": -1}, "sta.seed=-1 is out of range"),
        ("video_swin_tiny", {"depths": "1,1,1,1001"}, "depths=1x1x1x1001 is out of range"),
        ("vit_small", {"embed_dim": 65_536, "depth": 1000, "heads": 64}, "does not fit into this machine"),
    ],
)
def test_numbers_have_ranges(name, settings, what):
    with pytest.raises(UsageError) as caught:
        zoo.create(name, **settings)
    assert what in caught.value.what
    assert caught.value.why
