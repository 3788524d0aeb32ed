"""What `verify` builds for the comparison with PyTorch: nothing that only a bundle names is imported or opened."""

from __future__ import annotations

import subprocess
import sys

import pytest
from bundles import SIZE, small_bundle

import dvexport
from dvexport.bundle.archive import Bundle, write_bundle
from dvexport.bundle.manifest import Manifest, ModelEntry
from dvexport.cli import main
from dvexport.errors import BundleError, DvexportError, UsageError
from dvexport.export import build_model
from dvexport.models.config import ResNetConfig
from dvexport.models.settings import parse_settings
from dvexport.rebuild import rebuild
from dvexport.verify import verify
from dvexport.video.preprocess import MAX_SIDE, Preprocess

pytestmark = pytest.mark.slow

DSTEP = "dstep_resnet18"
OPTIONS = {"width": 0.25, "size": [SIZE, SIZE], "classes": 12, "frames": 5}

FACTORY = """
import pathlib
from dvexport.models import zoo

pathlib.Path("imported").touch()

def tiny(width=0.25, classes=12, weights=None):
    if weights is not None:
        pathlib.Path(weights).touch()
    return zoo.create("tsn_resnet18", width=width, classes=classes, size=(64, 64), frames=5)
"""


def named(name: str, settings=None) -> Manifest:
    """A good manifest that says that it was made from something else."""
    model = ModelEntry(name=name, settings=settings or {})
    return small_bundle(DSTEP, "stream").manifest.model_copy(update={"model": model, "checkpoint": None})


def renamed(tmp_path, name: str, settings=None) -> Bundle:
    """The bundle of that manifest."""
    bundle = small_bundle(DSTEP, "stream")
    files = {n: bundle.read(n) for n in bundle.manifest.files}
    return write_bundle(tmp_path / "renamed.dvx", named(name, settings), files)


def build(manifest: Manifest, **options):
    return rebuild(manifest, inputs={"frames": (3, SIZE, SIZE)}, outputs={"logits": (12,)}, **options)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a factory in it, which leaves a file where it is imported."""
    (tmp_path / "my_rebuilt.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rebuilt", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A bundle of that factory, as exported."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_rebuilt.py").write_text(FACTORY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return dvexport.export("my_rebuilt:tiny", backend="onnx", settings={"classes": "3"}, output=folder / "own.dvx")


@pytest.fixture
def own(exported, here):
    """That bundle, in a folder where nothing was imported yet."""
    sys.modules.pop("my_rebuilt", None)
    return exported


def compared(report) -> bool:
    assert report.ok
    return any(row.name.startswith("PyTorch") for row in report.rows)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("subprocess:getoutput", {"cmd": "touch ran"}),
        ("os:system", {"command": "touch ran"}),
        ("builtins:open", {"file": "ran", "mode": "w"}),
        ("my_rebuilt:tiny", {}),
        ("my_rebuilt", {}),
        (":tiny", {}),
        ("subprocess:getoutput:x", {"cmd": "touch ran"}),
        ("./saved", {}),
        ("saved", {}),
        ("huggingface", {}),
        ("../weights/tsm_motion", {}),
        ("DSTEP_RESNET18", {}),
    ],
)
def test_what_a_manifest_names_is_left_alone(here, name, settings):
    (here / "saved").mkdir()
    (here / "saved" / "config.json").write_text("{no json: opening it is an error}")
    net, notes = build(named(name, settings))
    assert net is None
    assert [note.partition(":")[0] for note in notes] == ["not compared with PyTorch"]
    assert not (here / "ran").exists()
    assert not (here / "imported").exists()


def test_the_command_line_runs_no_shell_command_either(here):
    bundle = renamed(here, "subprocess:getoutput", {"cmd": "touch ran"})
    done = subprocess.run(
        [sys.executable, "-m", "dvexport", "verify", str(bundle.path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "note: not compared with PyTorch" in done.stdout
    assert not (here / "ran").exists()


def test_a_module_of_the_working_folder_stands_in_for_none_of_ours(here):
    for name in ("pydantic", "click", "typing"):  # what is imported first too
        (here / f"{name}.py").write_text("import os; os.close(os.open('ran', os.O_CREAT))")
    for module in ("dvexport", "dvexport.cli"):
        code = ["-m", module, "inspect", str(small_bundle(DSTEP, "stream").path)]
        done = subprocess.run([sys.executable, *code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not (here / "ran").exists()


def test_a_program_of_the_users_keeps_its_working_folder(here):
    for name, text in (("theirs/__init__", "import dvexport"), ("theirs/__main__", "import beside"), ("beside", "")):
        (here / f"{name}.py").parent.mkdir(exist_ok=True)
        (here / f"{name}.py").write_text(text)
    subprocess.run([sys.executable, "-m", "theirs"], check=True)


def test_a_factory_that_the_user_names_is_compared(own):
    assert compared(verify(own, model="my_rebuilt:tiny", settings={"classes": "3"}))
    assert compared(verify(own, model="my_rebuilt:tiny", settings={"classes": 3}))


def test_so_it_is_on_the_command_line(own, capsys):
    with pytest.raises(SystemExit) as left:
        main(["verify", str(own.path), "--model", "my_rebuilt:tiny", "--set", "classes=3"])
    out = capsys.readouterr().out
    assert left.value.code == 0
    assert "PyTorch: logits" in out
    assert "note" not in out.replace("note: no stream", "")


def test_a_factory_gets_no_option_from_a_bundle(here):
    bundle = named("my_rebuilt:tiny", {"weights": "opened"})
    with pytest.raises(UsageError, match="exported with other options for my_rebuilt:tiny") as error:
        build(bundle, model="my_rebuilt:tiny")
    assert error.value.hint == "if these are right: --set weights=opened"
    assert not (here / "opened").exists()
    assert not (here / "imported").exists()


def test_a_model_called_otherwise_is_compared_and_told(own):
    net = build_model("my_rebuilt:tiny", None, {"classes": 3}).model
    report = verify(own, model=net)
    assert compared(report)
    assert "compared with PyTorch as 'tsn_resnet18', which you named" in report.notes[0]
    assert "the bundle says 'my_rebuilt:tiny'" in report.notes[0]


def test_options_are_for_factories():
    with pytest.raises(UsageError, match="only a factory of your own is given options"):
        build(named(DSTEP), settings={"classes": 3})


def test_a_file_that_a_manifest_names_for_labels_is_not_read(tmp_path):
    net, notes = build(named(DSTEP, {**OPTIONS, "labels": str(tmp_path / "absent")}))
    assert (net.config.width, net.labels[0], notes) == (0.25, "class 0", ())


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        ({"classes": 10**12}, BundleError, "model.settings.classes"),
        ({"classes": 13}, BundleError, "its own shapes 12"),
        ({"size": [10**6, 64]}, BundleError, "model.settings.size"),
        ({"size": [32, 32]}, BundleError, "its own shapes 64,64"),
        ({"frames": 6}, BundleError, "its own shapes 5"),
        ({"width": 1e30}, BundleError, "model.settings.width"),
        ({"width": 15.0}, BundleError, "its weights and tables take"),
        ({"width": float("nan")}, BundleError, "model.settings.width"),
        ({"hidden": 65536, "width": 12}, BundleError, "its weights and tables take"),
        ({"hidden_quota": 1 << 40}, BundleError, "model.settings.hidden_quota"),
        ({"enabled_stages": [10**9]}, BundleError, "model.settings.enabled_stages"),
        ({"width": 10**400}, DvexportError, "width"),
        ({"checkpoint": "x"}, UsageError, "unknown option 'checkpoint'"),
        ({"name": "x"}, UsageError, "unknown option 'name'"),
        ({"weights": "x"}, UsageError, "unknown option 'weights'"),
    ],
)
def test_options_out_of_bounds_build_nothing(changes, error, why):
    with pytest.raises(error) as raised:
        build(named(DSTEP, {**OPTIONS, **changes}))
    assert why in str(raised.value)


@pytest.mark.parametrize("settings", [{"depth": 10**9}, {"depth": 300}, {"embed_dim": 10**6}, {"sta_groups": [10**9]}])
def test_a_transformer_out_of_bounds_is_refused_too(settings):
    with pytest.raises(BundleError):
        build(named("vit_small", settings))


def test_a_large_model_of_the_zoo_needs_a_bundle_as_large():
    with pytest.raises(BundleError, match="can't be those of its model") as error:
        build(named("vit_huge"))
    assert "more than" in error.value.why


def test_a_model_of_other_shapes_is_not_the_one(own):
    options = {name: value for name, value in OPTIONS.items() if name != "classes"}
    with pytest.raises(UsageError, match="it has classes: 174, and the bundle's results 12"):
        build(named(DSTEP, options))
    with pytest.raises(UsageError, match="it has classes: 3, and the bundle's results 12"):
        build(named(DSTEP), model=build_model("my_rebuilt:tiny", None, {"classes": 3}).model)


def test_a_number_beyond_all_floats_is_a_usage_error():
    with pytest.raises(UsageError, match="option width can't be"):
        parse_settings(ResNetConfig, {"width": 10**400})


@pytest.mark.parametrize("sizes", [{"resize": 10**9}, {"size": (64, 10**9)}, {"resize": MAX_SIDE + 1}])
def test_frames_of_any_size_are_not_asked_for(sizes):
    with pytest.raises(UsageError, match="the preprocessing is not usable"):
        Preprocess(**sizes)
    assert Preprocess(resize=MAX_SIDE).resize == MAX_SIDE
