"""Official files of models that differ in one option: imported as what they are, refused by name, or asked about."""

import dataclasses
import shlex
import sys

import official_layouts as official
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from models_reference import randomize_norms, resnet
from random_gates import randomize_gates
from sample_transformers import keys_of_width, small_swin

import dvexport
from dvexport.cli import cli
from dvexport.errors import CheckpointError, UntoldError, UsageError
from dvexport.export import build_model
from dvexport.models import zoo
from dvexport.models.checkpoints.checkpoint import save_checkpoint
from dvexport.models.checkpoints.families import FAMILIES

pytestmark = pytest.mark.slow

SMALL = {"width": 0.125, "classes": 6, "size": (64, 64), "frames": 4}
ANSWERS = {"size": 64, "frames": 4}
TSM = {**ANSWERS, "shift_div": 8}
GATED = {**ANSWERS, "gate_relu": True, "gate_pool": "mean"}


def source(name, **settings):
    torch.manual_seed(0)
    model = zoo.create(name, **{**SMALL, **settings})
    randomize_gates(model)
    randomize_norms(model)
    return model


def saved(tmp_path, keys):
    return official.save(tmp_path / "c.pth.tar", keys, wrapped="state_dict")


def tsm_file(tmp_path, change=lambda keys: keys, name="tsm_resnet18", **settings):
    return saved(tmp_path, change(official.tsm_keys(source(name, **settings))))


def clip(frames=4):
    return torch.randn(frames, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_option_has_a_role(family):
    fields = {field.name for field in dataclasses.fields(FAMILIES[family].config)}
    assert set(FAMILIES[family].roles) == fields
    assert set(FAMILIES[family].roles.values()) <= {"inferred", "named", "asked", "fixed", "chosen", "training"}


class Shifted(torch.nn.Module):
    """What official TSM wraps around a module, for one clip."""

    def __init__(self, net, div):
        super().__init__()
        self.net, self.div = net, div

    def forward(self, x):
        fold, out = x.shape[1] // self.div, torch.zeros_like(x)
        out[:-1, :fold] = x[1:, :fold]
        out[1:, fold : 2 * fold] = x[:-1, fold : 2 * fold]
        out[:, 2 * fold :] = x[:, 2 * fold :]
        return self.net(out)


@pytest.mark.parametrize("place", ["conv1", "in_place"])
@pytest.mark.parametrize("depth", [18, 50])
def test_tsm_is_what_its_keys_say(tmp_path, place, depth):
    """`--shift_place=block` moves the identity too; importing it as `blockres` was off by a sixth of the logits."""
    name = f"tsm_resnet{depth}"
    path = tsm_file(tmp_path, name=name, shift_place=place)
    loaded = zoo.create(name, path, **TSM)
    assert loaded.import_report.inferred["shift_place"] == place
    plain = zoo.create(f"tsn_resnet{depth}", **SMALL)
    plain.load_state_dict(loaded.state_dict())
    for stage in (plain.layer1, plain.layer2, plain.layer3, plain.layer4):
        for i, block in enumerate(stage):
            if place == "in_place":
                stage[i] = Shifted(block, 8)
            else:
                block.conv1 = Shifted(block.conv1, 8)
    with torch.no_grad():
        found = loaded.per_frame_logits(clip())
        torch.testing.assert_close(found, plain.per_frame_logits(clip()))
        torch.testing.assert_close(found, resnet(loaded.state_dict(), clip(), loaded.config))
        other = resnet(loaded.state_dict(), clip(), dataclasses.replace(loaded.config, shift_place="block"))
    assert (found - other).abs().max() > 1e-2 * found.abs().max()
    with pytest.raises(UsageError, match="contradicts the checkpoint"):
        zoo.create(name, path, **TSM, shift_place="block")


@pytest.mark.slow
def test_tsm_in_place_is_exported_and_verified(tmp_path):
    path = tsm_file(tmp_path, shift_place="in_place")
    bundle = dvexport.export(
        "tsm_resnet18", checkpoint=path, settings=TSM, backend="onnx", mode="clip", output=tmp_path / "t.dvx"
    )
    report = dvexport.verify(bundle, checkpoint=path)
    assert report.ok
    assert "PyTorch: logits" in {row.name for row in report.rows}


def renamed(pattern, name):
    return lambda keys: {key.replace(pattern, name): value for key, value in keys.items()}


def with_key(key, *shape):
    return lambda keys: {**keys, "module.base_model." + key: torch.zeros(shape)}


def without(text):
    return lambda keys: {key.replace(".net." if text in key else "\0", "."): value for key, value in keys.items()}


def of_blocks(counts):
    """Return a change that gives each stage as many blocks, copies of its second one."""

    def change(keys):
        more = dict(keys)
        for stage, count in enumerate(counts, 1):
            for block in range(2, count):
                old, new = f".layer{stage}.1.", f".layer{stage}.{block}."
                more |= {key.replace(old, new): value for key, value in keys.items() if old in key}
        return more

    return change


VARIANTS = {
    "temporal-pool": (renamed("layer2.", "layer2.net."), "temporal pooling"),
    "non-local": (with_key("layer2.0.nl.g.weight", 8, 16, 1, 1, 1), "non-local"),
    "non-local-wrapped": (renamed("layer2.0.", "layer2.0.block."), "non-local"),
    "one-block-unshifted": (without("layer3.1."), "layer3.1"),
    "conv2-shifted": (renamed("layer1.0.conv2.", "layer1.0.conv2.net."), "marks a shift where TSM has none"),
    "two-places": (renamed("layer1.0.conv1.net.", "layer1.0.net.conv1."), "shifts of two kinds"),
    "resnet101": (of_blocks((3, 4, 23, 3)), "(3, 4, 23, 3) basic blocks"),
    "resnet34": (of_blocks((3, 4, 6, 3)), "ResNet-34"),
    "flow": (with_key("conv1.weight", 8, 10, 7, 7), "optical flow"),
    "rgb-differences": (with_key("conv1.weight", 8, 15, 7, 7), "differences of RGB frames"),
    "cgnet": (with_key("layer1.0.conv1.threshold", 1, 8, 1, 1), "CGNet"),
    "dynconv": (with_key("layer1.0.masker.maskconv.conv.weight", 1, 8, 3, 3), "DynConv"),
    "dgnet": (with_key("layer1.0.mask_c.atten_c.0.weight", 2, 8, 1, 1), "DGNet"),
    "two-classifiers": (with_key("fc.weight", 6, 64), "one weight twice"),
    "no-prefix-twice": (lambda keys: {**keys, "base_model.bn1.bias": torch.zeros(8)}, "one weight twice"),
    "integer-weights": (
        lambda keys: {k: v.to(torch.int8) if k.endswith("conv2.weight") else v for k, v in keys.items()},
        "torch.int8 instead of torch.float32",
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_tsm_that_keys_tell_are_refused_by_name(tmp_path, variant):
    change, what = VARIANTS[variant]
    with pytest.raises(CheckpointError) as error:
        zoo.create("tsm_resnet18", tsm_file(tmp_path, change), **TSM)
    assert what in str(error.value)


def test_in_place_shift_of_half_a_block_is_refused(tmp_path):
    path = tsm_file(tmp_path, renamed("layer2.0.net.bn1.", "layer2.0.bn1."), shift_place="in_place")
    with pytest.raises(CheckpointError, match="shifts other blocks than TSM does") as error:
        zoo.create("tsm_resnet18", path, **TSM)
    assert "layer2.0" in error.value.why


@pytest.mark.parametrize("name", ["tsm_mobilenetv2", "tsm_online_mobilenetv2"])
def test_mobilenet_shifts_where_its_file_says(tmp_path, name):
    keys = official.mobilenet_offline_keys(source("tsm_mobilenetv2", width=1.0))
    path = saved(tmp_path, keys)
    assert zoo.create(name, path, **TSM).config.shift == ("online" if "online" in name else "bidirectional")
    fewer = saved(tmp_path, {key.replace("features.9.conv.0.net.", "features.9.conv.0."): v for key, v in keys.items()})
    with pytest.raises(CheckpointError, match="shifts other blocks than TSM does"):
        zoo.create(name, fewer, **TSM)
    unshifted = saved(tmp_path, {key.replace(".net.", "."): value for key, value in keys.items()})
    with pytest.raises(CheckpointError, match=f"another model than {name}") as error:
        zoo.create(name, unshifted, **TSM)
    assert error.value.hint == "--set shift=none"
    assert zoo.create(name, unshifted, **ANSWERS, shift="none").config.shift == "none"


@pytest.mark.parametrize("name", ["adafuse_resnet18", "adafuse_resnet50_last", "dstep_resnet18"])
@pytest.mark.parametrize("shift", ["none", "bidirectional", "online"])
def test_shift_of_adafuse_and_dstep_is_asked_for(tmp_path, name, shift):
    """Trained with or without --shift, the keys are the same."""
    model = source(name, hidden=24, shift=shift)
    path = saved(tmp_path, official.adafuse_keys(model))
    with pytest.raises(UntoldError, match="nothing in the checkpoint tells shift, and the numbers depend on it"):
        zoo.create(name, path, **GATED)
    if shift != "none":
        with pytest.raises(UntoldError, match="tells shift_div, and"):
            zoo.create(name, path, **GATED, shift=shift)
    loaded = zoo.create(name, path, **GATED, shift=shift, **({} if shift == "none" else {"shift_div": 8}))
    with torch.no_grad():
        found = loaded.per_frame_logits(clip())
        torch.testing.assert_close(found, resnet(model.state_dict(), clip(), model.config), rtol=1e-4, atol=1e-5)
    assert loaded.import_report.assumed == {}


@pytest.mark.parametrize(("option", "value"), [("gate_relu", False), ("gate_pool", "max")])
def test_what_a_policy_does_between_its_weights_is_asked_for(tmp_path, option, value):
    model = source("dstep_resnet18", hidden=24, **{option: value})
    path = saved(tmp_path, official.adafuse_keys(model))
    answers = {**GATED, "shift": "none"}
    with pytest.raises(UntoldError, match=f"tells {option}, and"):
        zoo.create("dstep_resnet18", path, **{key: v for key, v in answers.items() if key != option})
    loaded = zoo.create("dstep_resnet18", path, **{**answers, option: value})
    with torch.no_grad():
        found = loaded.per_frame_logits(clip())
        torch.testing.assert_close(found, resnet(model.state_dict(), clip(), model.config), rtol=1e-4, atol=1e-5)


ADAFUSE_VARIANTS = {
    "dense-in-block": ("layer1.0.policy_net2.gate_fc0.weight", "--dense_in_block"),
    "triple-linear": ("layer1.0.policy_net.gate_fc2.weight", "--triple_linear"),
    "convolving": ("layer1.0.policy_net.gate_conv_embed.weight", "--gate_conv_embed_type"),
    "ghost": ("layer1.0.gate_hist_conv.weight", "--gate_history_conv_type"),
    "attention": ("attention_fc0.weight", "--policy_attention"),
    "unread-shared-net": ("gate_fc0s.999_999.weight", "no block of the checkpoint reads"),
}


@pytest.mark.parametrize("variant", ADAFUSE_VARIANTS)
def test_variants_of_adafuse_that_keys_tell_are_refused_by_name(tmp_path, variant):
    key, what = ADAFUSE_VARIANTS[variant]
    keys = with_key(key, 3, 3)(official.adafuse_keys(source("adafuse_resnet18", hidden=24)))
    with pytest.raises(CheckpointError, match=what):
        zoo.create("adafuse_resnet18", saved(tmp_path, keys), assume_defaults=True)


@pytest.mark.parametrize(("left_out", "what"), [("gate_fc1", "--single_linear"), ("policy_net", "--gate_threshold")])
def test_adafuse_with_fewer_layers_in_its_policies(tmp_path, left_out, what):
    keys = official.adafuse_keys(source("adafuse_resnet18", hidden=24, shared_policies=False))
    keys = {key: value for key, value in keys.items() if left_out not in key}
    for name in ("adafuse_resnet18", "tsn_resnet18"):
        with pytest.raises(CheckpointError, match=what):
            zoo.create(name, saved(tmp_path, keys), assume_defaults=True)


@pytest.fixture(scope="module")
def assumed(tmp_path_factory):
    """An export that assumes what nothing tells: its checkpoint, its bundle and what the command printed."""
    folder = tmp_path_factory.mktemp("assumed")
    path = saved(folder, official.adafuse_keys(source("dstep_resnet18", hidden=24, enabled_stages=(3,))))
    call = [
        "export",
        "dstep_resnet18",
        "--checkpoint",
        path,
        "--set",
        "size=64",
        "-o",
        folder / "x.dvx",
        "--backend",
        "onnx",
    ]
    result = CliRunner().invoke(cli, [*map(str, call), "--assume-defaults"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return path, folder / "x.dvx", result.output


def test_what_was_inferred_given_and_assumed_is_kept_and_printed(assumed):
    _, bundle, output = assumed
    assert "assumed: frames=8 gate_pool=mean gate_relu=true shift=none  (nothing tells it" in output
    assert "given: size=64" in output
    assert " hidden=24 " in next(line for line in output.splitlines() if line.startswith("inferred: "))
    entry = dvexport.Bundle.open(bundle).manifest.model
    assert entry.assumed == {"shift": "none", "gate_relu": True, "gate_pool": "mean", "frames": 8}
    assert (entry.inferred["hidden"], entry.inferred["semantics"]) == (24, "code")
    assert entry.settings == {"size": "64"}
    shown = CliRunner().invoke(cli, ["inspect", str(bundle)], catch_exceptions=False).output
    assert "assumed" in shown and "gate_pool=mean" in shown and "hidden=24" in shown


def test_verify_asks_nothing_and_takes_no_other_defaults_than_the_export(assumed, monkeypatch):
    path, bundle, _ = assumed
    describe, create, built = zoo.describe, zoo.create, []

    def of_a_later_version(name):
        info = describe(name)
        return dataclasses.replace(info, options={**info.options, "frames": 3})

    monkeypatch.setattr(zoo, "describe", of_a_later_version)
    monkeypatch.setattr(zoo, "create", lambda *a, **k: built.append(create(*a, **k)) or built[-1])
    report = dvexport.verify(dvexport.Bundle.open(bundle), checkpoint=path)
    assert report.ok
    assert "PyTorch: logits" in {row.name for row in report.rows}
    assert built[0].config.frames == 8


def test_the_refusal_ends_with_a_command_that_works(assumed, tmp_path, monkeypatch):
    path, out = assumed[0], tmp_path / "my model.dvx"
    call = [
        "export",
        "dstep_resnet18",
        "-o",
        out,
        "--set",
        "size=64",
        "--backend",
        "onnx",
        "--mode",
        "clip",
        "--checkpoint",
        path,
    ]
    with pytest.raises(UntoldError, match="tells shift, gate_relu, gate_pool, frames, and the numbers") as error:
        CliRunner().invoke(cli, [str(word) for word in call], catch_exceptions=False)
    assert not out.exists()
    for choice in ("none ", "bidirectional ", "online ", "true ", "false ", "mean ", "max "):
        assert f"\n        {choice}" in error.value.why
    command, _, note = error.value.hint.partition("\n")
    assert "--assume-defaults" in note
    calls = []

    def record(model, **options):
        calls.append((model, options))
        raise CheckpointError("stopped before the export")

    monkeypatch.setattr(sys.modules["dvexport.export"], "export", record)
    with pytest.raises(CheckpointError, match="stopped"):
        CliRunner().invoke(cli, shlex.split(command)[1:], catch_exceptions=False)
    ((model, options),) = calls
    assert (options["output"], options["mode"], options["assume_defaults"]) == (out, "clip", False)
    source = build_model(model, options["checkpoint"], options["settings"])
    assert source.model.import_report.assumed == {}
    assert source.model.config == build_model(model, path, {"size": 64}, assume_defaults=True).model.config


def test_random_weights_and_own_files_ask_nothing(tmp_path):
    model = source("dstep_resnet18", hidden=24, shift="online")
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, model, architecture="dstep_resnet18")
    assert zoo.create("dstep_resnet18", path).config == model.config
    assert zoo.create("dstep_resnet18", path, frames=3, size=96, dropout=0.1).config.frames == 3
    with pytest.raises(UsageError, match="shift=none contradicts the checkpoint") as error:
        zoo.create("dstep_resnet18", path, shift="none")
    assert "shift=online" in error.value.why
    with pytest.raises(UsageError, match="shift=none contradicts"):
        zoo.create("tsm_motion", shift="none")


@pytest.mark.parametrize("beside", ["model_ema", "state_dict_ema"])
def test_two_sets_of_weights_in_one_file(tmp_path, beside):
    model = source("tsn_resnet18")
    path = official.save(tmp_path / "c.pth", model.state_dict(), wrapped="model", **{beside: model.state_dict()})
    with pytest.raises(CheckpointError, match="two sets of weights") as error:
        zoo.create("tsn_resnet18", path, **ANSWERS)
    assert beside in error.value.why


@pytest.mark.parametrize("window", [(2, 7, 7), (4, 7, 7), (2, 5, 5)])
def test_window_of_video_swin_is_told_by_its_tables(tmp_path, window):
    model = small_swin(window=",".join(map(str, window))).float()
    keys = official.swin_keys(model)
    settings = {"embed_dim": 8, "depths": "1,2,2,1", "frames": 8, "size": 64}
    loaded = zoo.create("video_swin_tiny", official.save(tmp_path / "s.pth", keys, wrapped="state_dict"), **settings)
    assert loaded.config.window == window
    bare = {key: value for key, value in keys.items() if not key.endswith("_index")}
    path = official.save(tmp_path / "b.pth", bare, wrapped="state_dict")
    with pytest.raises(UntoldError, match="tells window, and"):
        zoo.create("video_swin_tiny", path, **settings)
    assert zoo.create("video_swin_tiny", path, **settings, window=window).config.window == window
    first = next(key for key in keys if key.endswith("_index"))
    keys[first] = keys[first].T.contiguous()
    with pytest.raises(CheckpointError, match="that of no window"):
        zoo.create("video_swin_tiny", official.save(tmp_path / "t.pth", keys, wrapped="state_dict"), **settings)


def test_transformers_that_do_not_read_three_channels(tmp_path):
    keys = {**keys_of_width(768, depth=1), "patch_embed.proj.weight": torch.zeros(768, 2, 2, 16, 16)}
    with pytest.raises(CheckpointError, match="does not read RGB frames"):
        zoo.create("vit_base", official.save(tmp_path / "v.pth", keys, wrapped="module"), depth=1, assume_defaults=True)
    keys = official.swin_keys(small_swin().float())
    keys["backbone.patch_embed.proj.weight"] = F.pad(keys["backbone.patch_embed.proj.weight"], (0,) * 7 + (1,))
    with pytest.raises(CheckpointError, match="reads 4 channels"):
        zoo.create("video_swin_tiny", official.save(tmp_path / "s.pth", keys), embed_dim=8, depths="1,2,2,1")


DAMAGE = {
    "left out": lambda keys, key: keys.pop(key),
    "renamed": lambda keys, key: keys.update({key + "x": keys.pop(key)}),
    "one more": lambda keys, key: keys.update({key.rpartition(".")[0] + ".more.weight": torch.zeros(3)}),
    "a number": lambda keys, key: keys.update({key: torch.tensor(1.0)}),
    "empty": lambda keys, key: keys.update({key: keys[key][:0]}),
    "shorter": lambda keys, key: keys.update({key: keys[key][:-1]}),
}
LAYOUTS = {
    "tsm_resnet18": (lambda: official.tsm_keys(source("tsm_resnet18")), {}),
    "dstep_resnet18": (
        lambda: official.adafuse_keys(source("dstep_resnet18", hidden=24, shared_policies=False)),
        {},
    ),
    "tsm_mobilenetv2": (lambda: official.mobilenet_offline_keys(source("tsm_mobilenetv2", width=0.25)), {}),
    "vit_small": (
        lambda: dict(zoo.create("vit_small", depth=2, embed_dim=24, heads=3, size=32, frames=4).state_dict()),
        {"heads": 3, "depth": 2, "embed_dim": 24, "size": 32, "frames": 4},
    ),
    "video_swin_tiny": (
        lambda: official.swin_keys(small_swin().float()),
        {"embed_dim": 8, "depths": "1,2,2,1", "frames": 8, "size": 64},
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", LAYOUTS)
def test_no_key_is_lost_without_a_word(tmp_path, name, damage):
    make, settings = LAYOUTS[name]
    keys = make()
    weights = [key for key in keys if not key.endswith(("num_batches_tracked", "relative_position_index"))]
    # The first and the last layers, and one of each kind between.
    for key in {*weights[:2], *weights[-2:], *{key.rpartition(".")[2]: key for key in weights}.values()}:
        damaged = dict(keys)
        DAMAGE[damage](damaged, key)
        with pytest.raises(CheckpointError):
            zoo.create(name, official.save(tmp_path / "c.pth", damaged), assume_defaults=True, **settings)
