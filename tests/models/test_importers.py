"""Checkpoints in the layouts of their authors: read whole, or refused with what is wrong."""

import os
import pickle

import numpy as np
import official_layouts as official
import pytest
import torch
from models_reference import randomize_norms
from random_gates import randomize_gates
from safetensors.torch import save_file

from dvexport.errors import CheckpointError, UsageError
from dvexport.models import zoo
from dvexport.models.checkpoints.checkpoint import read_checkpoint

SMALL = {"width": 0.125, "classes": 6, "size": (64, 64)}


def source(name, **settings):
    torch.manual_seed(0)
    model = zoo.create(name, **{**SMALL, **settings})
    randomize_gates(model)
    randomize_norms(model)
    return model


def imported(name, path, **settings):
    """An import that asks nothing: what nothing tells is assumed."""
    return zoo.create(name, path, assume_defaults=True, **settings)


def same_function(loaded, original):
    frames = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        return torch.equal(loaded(frames), original(frames))


ADAFUSE = {
    "r18-shared": ("adafuse_resnet18", {"hidden": 24}),
    "r18-unshared": ("adafuse_resnet18", {"hidden": 24, "shared_policies": False}),
    "r50-quota": ("adafuse_resnet50", {"hidden_quota": 1536}),
    "r50-last": ("adafuse_resnet50_last", {"hidden": 20}),
    "no-history": ("adafuse_resnet18", {"hidden": 24, "history": False}),
    "no-skipping": ("adafuse_resnet18", {"hidden": 24, "skipping": False}),
    "no-bn": ("adafuse_resnet18", {"hidden": 24, "gate_bn": False}),
    "dstep-r18": ("dstep_resnet18", {"hidden": 24}),
    "dstep-r50": ("dstep_resnet50", {"hidden_quota": 1536}),
}


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "zip"])
@pytest.mark.parametrize("case", ADAFUSE)
def test_official_adafuse_and_dstep(tmp_path, case, legacy):
    name, settings = ADAFUSE[case]
    model = source(name, **settings)
    path = tmp_path / "ckpt.best.pth.tar"
    official.save(path, official.adafuse_keys(model), wrapped="state_dict", legacy=legacy)
    loaded = imported(name, path, size=(64, 64))
    assert loaded.config == model.config
    assert same_function(loaded, model)
    report = loaded.import_report
    assert report.layout == "official AdaFuse / D-STEP"
    assert report.inferred["classes"] == 6
    assert report.inferred["depth"] == model.config.depth
    assert report.assumed["frames"] == 8
    assert report.assumed["shift"] == "none"
    assert "size" not in report.assumed
    assert "frames=8" in "\n".join(report.lines())


def test_what_shapes_do_not_tell_is_given_by_name(tmp_path):
    model = source("adafuse_resnet18", hidden=24, shift="bidirectional", frames=16)
    path = official.save(tmp_path / "c.pth", official.adafuse_keys(model), wrapped="state_dict")
    loaded = imported("adafuse_resnet18", path, shift="bidirectional", frames="16", size="64")
    assert same_function(loaded, model)
    assert not loaded.causal
    assert loaded.preprocess.frames == 16
    assert {"frames", "shift", "size"}.isdisjoint(loaded.import_report.assumed)


def test_masked_stages_are_inferred(tmp_path):
    model = source("adafuse_resnet18", hidden=24, enabled_stages=(1, 2))
    path = official.save(tmp_path / "c.pth", official.adafuse_keys(model), wrapped="state_dict")
    assert imported("adafuse_resnet18", path).config.enabled_stages == (1, 2)


@pytest.mark.parametrize("name", ["tsn_resnet18", "tsm_resnet18", "tsm_resnet50", "tsm_online_resnet18"])
def test_official_tsm(tmp_path, name):
    model = source(name)
    path = official.save(
        tmp_path / "c.pth.tar", official.tsm_keys(model), wrapped="state_dict", legacy=True,
        epoch=49, arch="resnet", best_prec1=torch.tensor(55.0), optimizer={"param_groups": []},
    )  # fmt: skip
    loaded = imported(name, path, size=64)
    assert loaded.config == model.config
    assert same_function(loaded, model)
    assert loaded.import_report.layout == "official TSM / TSN"
    report = loaded.import_report
    if model.config.shift == "online":  # the file says that blocks are shifted, not in which direction
        assert report.assumed["shift"] == "online" and "shift" not in report.inferred
        assert "the logits of shift=online are others" in report.notes[-1]
    else:
        assert report.inferred["shift"] == model.config.shift and "shift" not in report.assumed
    assert report.notes[:2] == ("the weights are those under 'state_dict'", "'module.' was taken off every name")


@pytest.mark.parametrize("name", ["tsm_mobilenetv2", "tsm_online_mobilenetv2"])
@pytest.mark.parametrize("width", [1.0, 0.5, 1.4])
def test_official_mobilenet(tmp_path, name, width):
    model = source(name, width=width, classes=27)
    online = name == "tsm_online_mobilenetv2"
    keys = dict(model.state_dict()) if online else official.mobilenet_offline_keys(model)
    path = official.save(tmp_path / "c.pth.tar", keys, wrapped=None if online else "state_dict")
    loaded = imported(name, path, size=64)
    assert (loaded.config.width, loaded.config.classes) == (width, 27)
    assert loaded.config.shift == model.config.shift
    assert same_function(loaded, model)


def test_plain_state_dict_of_a_backbone(tmp_path):
    """What torchvision calls its layers, and dvexport too."""
    model = source("tsn_resnet50")
    for path in (official.save(tmp_path / "r50.pth", model.state_dict()), tmp_path / "r50.safetensors"):
        if path.suffix == ".safetensors":
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
        loaded = imported("tsn_resnet50", path, size=64)
        assert same_function(loaded, model)
        assert loaded.import_report.layout == "plain"


def test_half_precision_is_widened(tmp_path):
    keys = source("tsn_resnet18").half().state_dict()
    loaded = imported("tsn_resnet18", official.save(tmp_path / "half.pth", keys))
    assert loaded.fc.weight.dtype == torch.float32


def test_numpy_numbers_beside_the_weights(tmp_path):
    model = source("tsn_resnet18")
    path = official.save(
        tmp_path / "c.pth", official.tsm_keys(model), wrapped="state_dict", best_prec1=np.float64(55.5)
    )
    assert imported("tsn_resnet18", path).config.classes == 6


def test_numpy_numbers_under_their_old_name(tmp_path):
    """Files of numpy 1's days call the constructor of scalars numpy.core, not numpy._core."""
    keys = {"state_dict": {"fc.weight": torch.ones(2)}, "best_prec1": np.float64(55.5)}
    path = tmp_path / "old.pth"
    torch.save(keys, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_checkpoint(path).state["fc.weight"].tolist() == [1, 1]


@pytest.mark.slow
def test_large_file_with_shared_nets_stored_twice(tmp_path):
    """The published ResNet-50: 68.9 M stored values for 37.7 M parameters."""
    model = zoo.create("adafuse_resnet50")
    keys = official.adafuse_keys(model)
    stored = {k: v.clone() for k, v in keys.items()}
    stored_values = sum(v.numel() for k, v in stored.items() if "running" not in k and "num_batches" not in k)
    assert stored_values == pytest.approx(68.9e6, rel=5e-3)
    path = official.save(tmp_path / "sthv1_adatsn50.pth.tar", stored, wrapped="state_dict", legacy=True)
    assert path.stat().st_size > 250e6
    loaded = imported("adafuse_resnet50", path)
    assert loaded.config == model.config
    assert sum(p.numel() for p in loaded.parameters()) == pytest.approx(37.687e6, rel=1e-4)
    for (name, value), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_contradicting_copies_of_a_shared_net(tmp_path):
    keys = official.adafuse_keys(source("adafuse_resnet18", hidden=24))
    table = next(key for key in keys if "gate_fc0s" in key and key.endswith("weight"))
    keys[table] = keys[table] + 1
    path = official.save(tmp_path / "c.pth", keys, wrapped="state_dict")
    with pytest.raises(CheckpointError, match="contradicts itself") as error:
        imported("adafuse_resnet18", path)
    assert "gate_fc0s" in error.value.where


WRONG_MODEL = [
    ("adafuse_resnet18", "dstep_resnet18", "use dstep_resnet18"),
    ("dstep_resnet18", "adafuse_resnet18", "use adafuse_resnet18"),
    ("adafuse_resnet18", "adafuse_resnet50", "use adafuse_resnet50"),
    ("adafuse_resnet50", "adafuse_resnet50_last", None),
    ("tsn_resnet18", "adafuse_resnet50_last", "use adafuse_resnet50_last"),
    ("dstep_resnet18", "tsn_resnet18", "use tsn_resnet18"),
    ("tsn_resnet18", "tsm_resnet18", "use tsm_resnet18"),
    ("tsm_resnet18", "tsn_resnet18", "use tsn_resnet18"),
    ("tsm_resnet18", "tsm_online_mobilenetv2", "use tsm_online_mobilenetv2"),
]


@pytest.mark.parametrize(("asked", "given", "hint"), WRONG_MODEL)
def test_checkpoint_of_another_model(tmp_path, asked, given, hint):
    gated = "adafuse" in given or "dstep" in given
    model = source(given, **({"hidden": 24, "hidden_quota": 0} if gated else {}))
    if "mobilenet" in given:
        keys = dict(model.state_dict())
    else:
        keys = official.adafuse_keys(model) if gated else official.tsm_keys(model)
    path = official.save(tmp_path / "c.pth", keys, wrapped="state_dict")
    if hint is None:
        assert imported(asked, path).config.enabled_stages == (3,)
        return
    with pytest.raises(CheckpointError, match=f"another model than {asked}") as error:
        imported(asked, path)
    assert hint in error.value.hint


def test_setting_that_contradicts_the_weights(tmp_path):
    path = official.save(tmp_path / "c.pth", official.adafuse_keys(source("adafuse_resnet18", hidden=24)))
    with pytest.raises(UsageError, match="hidden=512 contradicts the checkpoint") as error:
        imported("adafuse_resnet18", path, hidden=512)
    assert "hidden=24" in error.value.why


def test_missing_and_unexpected_keys_are_listed(tmp_path):
    keys = official.adafuse_keys(source("adafuse_resnet18", hidden=24))
    del keys["module.base_model.layer2.0.bn2.weight"]
    keys["module.base_model.layer2.0.surplus"] = torch.zeros(1)
    path = official.save(tmp_path / "c.pth", keys)
    with pytest.raises(CheckpointError, match="don't fit the model") as error:
        imported("adafuse_resnet18", path)
    assert "1 missing: module.base_model.layer2.0.bn2.weight" in error.value.why
    assert "1 unexpected: module.base_model.layer2.0.surplus" in error.value.why
    assert "adafuse_resnet18" in error.value.hint


def test_misshapen_weight_is_named(tmp_path):
    keys = dict(source("tsn_resnet18").state_dict())
    keys["layer3.0.conv2.weight"] = keys["layer3.0.conv2.weight"][:-1]
    with pytest.raises(CheckpointError, match=r"layer3.0.conv2.weight \(31, 32, 3, 3\) instead of"):
        imported("tsn_resnet18", official.save(tmp_path / "c.pth", keys))


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        (["module.lite_backbone.features.0.weight", "module.rnn.weight_ih"], "AR-Net"),
        (["blocks.0.conv.conv_xy.weight"], "X3D"),
    ],
)
def test_foreign_family_is_named(tmp_path, keys, family):
    path = official.save(tmp_path / "c.pth", {key: torch.zeros(1) for key in keys})
    with pytest.raises(CheckpointError, match="fit no model") as error:
        imported("tsn_resnet18", path)
    assert family in error.value.why


def test_resnet_of_another_depth(tmp_path):
    keys = dict(source("tsn_resnet18").state_dict())
    keys |= {k.replace("layer3.1", "layer3.2"): v for k, v in keys.items() if k.startswith("layer3.1.")}
    with pytest.raises(CheckpointError, match="ResNet that dvexport has not") as error:
        imported("tsn_resnet18", official.save(tmp_path / "c.pth", keys))
    assert "(2, 2, 3, 2)" in error.value.why


def test_unsupported_granularity(tmp_path):
    keys = official.adafuse_keys(source("adafuse_resnet18", hidden=24, shared_policies=False))
    for key in list(keys):
        if key.endswith("gate_fc1.weight"):
            keys[key] = keys[key][: keys[key].shape[0] // 2]
    with pytest.raises(CheckpointError, match="granularity"):
        imported("adafuse_resnet18", official.save(tmp_path / "c.pth", keys))


class _RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle"])
def test_pickle_that_would_run_code_is_refused(tmp_path, kind):
    trace, path = tmp_path / "executed", tmp_path / "evil.pth"
    content = {"state_dict": {"fc.weight": torch.zeros(2)}, "args": _RunsCode(trace)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps({"args": _RunsCode(trace)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match="would run code") as error:
        imported("tsn_resnet18", path)
    assert "mkdir" in error.value.why
    assert not trace.exists()


def test_pickle_of_a_newer_protocol_is_refused(tmp_path):
    trace, path = tmp_path / "executed", tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(_RunsCode(trace), protocol=4))
    with pytest.raises(CheckpointError, match="would run code"):
        imported("tsn_resnet18", path)
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_truncated_file(tmp_path, kind, share):
    model = source("tsn_resnet18")
    path = tmp_path / ("c.safetensors" if kind == "safetensors" else "c.pth")
    if kind == "safetensors":
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    else:
        official.save(path, model.state_dict(), legacy=kind == "legacy")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        imported("tsn_resnet18", path)


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "zip"])
def test_damaged_bytes_never_escape_as_another_error(tmp_path, legacy):
    path = official.save(tmp_path / "c.pth", {"fc.weight": torch.zeros(3, 4)}, legacy=legacy)
    whole = path.read_bytes()
    refused = 0
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            read_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("content", [b"this is some text, not weights" * 100, bytes(range(149, 256)) * 50])
def test_file_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "video.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        imported("tsn_resnet18", path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        zoo.create("tsn_resnet18", tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="this is a folder"):
        zoo.create("tsn_resnet18", tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    keys = {k: v.clone() for k, v in source("tsn_resnet18").state_dict().items()}
    keys["layer2.0.conv1.weight"][0, 0] = value
    with pytest.raises(CheckpointError, match="NaN or infinite") as error:
        imported("tsn_resnet18", official.save(tmp_path / "c.pth", keys))
    assert "layer2.0.conv1.weight" in error.value.where
    assert error.value.why.startswith("9 of ")


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, {"state_dict": {"fc.weight": "text"}}])
def test_file_without_weights(tmp_path, content):
    path = tmp_path / "c.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="holds no"):
        read_checkpoint(path)
