"""Directories of Hugging Face's library, with that library as the oracle."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_transformers import BIAS, edit_config, edit_weights, save_videomae

from dvexport.errors import CheckpointError, UntoldError, UsageError
from dvexport.export import build_model, file_digest
from dvexport.models import zoo
from dvexport.models.checkpoints.huggingface import load_directory

pytestmark = pytest.mark.slow


def close(model, oracle, frames=4, size=32):
    clips = torch.randn(2, frames, 3, size, size)
    with torch.no_grad():
        want, got = oracle(pixel_values=clips).logits, model(clips.flatten(0, 1))
    return torch.allclose(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_attention_heads": 6},
        {"qkv_bias": False},
        {"use_mean_pooling": False},
        {"tubelet_size": 4},
        {"patch_size": 8, "num_hidden_layers": 1},
        {"layer_norm_eps": 0.5},
    ],
)
def test_logits_are_those_of_the_library(tmp_path, options):
    oracle = save_videomae(tmp_path, **options)
    model = zoo.create(str(tmp_path))
    assert close(model, oracle)
    assert model.labels == ["wave", "nod", "hold"]
    assert not model.training


def test_epsilons_and_heads_are_the_configs(tmp_path):
    save_videomae(tmp_path, num_attention_heads=8)
    config = zoo.create(str(tmp_path)).config
    assert (config.norm_eps, config.head_eps, config.heads) == (1e-12, 1e-5, 8)


def test_shards(tmp_path):
    oracle = save_videomae(tmp_path, shards="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert close(zoo.create(str(tmp_path)), oracle)


@pytest.mark.parametrize("names", [("q_bias", "v_bias"), ("query.bias", "value.bias")])
def test_biases_under_every_name_that_the_library_has_had(tmp_path, names):
    """For a while it stored one of the keys too, which changes nothing."""
    oracle, keys = save_videomae(tmp_path), {}
    (tmp_path / "model.safetensors").unlink()
    for key, value in oracle.state_dict().items():
        stem, _, last = key.rpartition("attention.attention.")
        which = {"q_bias": 0, "query.bias": 0, "v_bias": 1, "value.bias": 1}.get(last) if stem else None
        keys[key if which is None else f"{stem}attention.attention.{names[which]}"] = value
        keys[f"{stem}attention.attention.key.bias"] = torch.randn(24)
    del keys["attention.attention.key.bias"]
    torch.save(keys, tmp_path / "pytorch_model.bin")
    assert close(zoo.create(str(tmp_path)), oracle)


@pytest.mark.parametrize("said", [{"qkv_bias": False}, {"qv_bias": False}, {"qkv_bias": False, "qv_bias": True}])
def test_biases_that_the_config_denies(tmp_path, said):
    save_videomae(tmp_path, qkv_bias=False)
    config = json.loads((tmp_path / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("qkv_bias", "qv_bias")}
    (tmp_path / "config.json").write_text(json.dumps({**config, **said}))
    model = zoo.create(str(tmp_path))
    assert not model.blocks[0].attn.q_bias.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_half_precision(tmp_path, dtype, file):
    oracle = save_videomae(tmp_path).to(dtype)
    (tmp_path / "model.safetensors").unlink()
    (save_file if file.endswith("tensors") else torch.save)(dict(oracle.state_dict()), tmp_path / file)
    edit_config(tmp_path, torch_dtype=str(dtype).removeprefix("torch."))
    assert close(zoo.create(str(tmp_path)), oracle.float())


def test_shards_of_pickles(tmp_path):
    oracle = save_videomae(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    keys = list(oracle.state_dict().items())
    index = {}
    for number, part in enumerate((keys[:20], keys[20:])):
        name = f"pytorch_model-{number + 1:05}-of-00002.bin"
        torch.save(dict(part), tmp_path / name)
        index |= {key: name for key, _ in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert close(zoo.create(str(tmp_path)), oracle)


def test_classes_are_those_of_the_weights_where_the_config_is_silent(tmp_path):
    oracle = save_videomae(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "label" not in k}))
    model = zoo.create(str(tmp_path))
    assert model.config.classes == 3
    assert close(model, oracle)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"hidden_size": float("inf")}, "infinity"),
        ({"hidden_size": 0}, "division"),
        ({"num_hidden_layers": 10**7}, "depth=10000000"),
        ({"num_labels": 10**12, "id2label": None}, "classes=1000000000000"),
        ({"image_size": 10**9}, "size="),
        ({"num_frames": 10**12}, "frames=1000000000000"),
        ({"layer_norm_eps": "much"}, "much"),
        ({"architectures": 5}, "5"),
        ({"architectures": {"a": 1}}, "a"),
        ({"id2label": 5}, "int"),
    ],
)
def test_a_config_that_describes_no_model_is_refused_before_one_is_built(tmp_path, change, why):
    save_videomae(tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(CheckpointError) as caught:
        zoo.create(str(tmp_path))
    assert why in f"{caught.value.why}"


def test_preprocessing(tmp_path):
    save_videomae(tmp_path, mean=[0.1, 0.2, 0.3])
    model = zoo.create(str(tmp_path))
    assert model.preprocess.mean == (0.1, 0.2, 0.3)
    assert model.preprocess.std == (0.5, 0.25, 0.125)
    assert (model.preprocess.resize, model.preprocess.size, model.preprocess.frames) == (40, (32, 32), 4)
    assert model.import_report.assumed == {}


def test_preprocessing_that_nothing_tells_is_asked_for(tmp_path):
    save_videomae(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UntoldError, match="how frames are normalised") as error:
        zoo.create(str(tmp_path))
    assert "--assume-defaults" in error.value.hint
    model = zoo.create(str(tmp_path), assume_defaults=True)
    assert model.import_report.assumed == {"mean": model.preprocess.mean, "std": model.preprocess.std}


def test_preprocessing_left_out_is_the_librarys(tmp_path):
    save_videomae(tmp_path)
    assert zoo.create(str(tmp_path)).preprocess.mean == (0.5, 0.5, 0.5)
    edit_config(tmp_path, "preprocessor_config.json", do_normalize=False)
    model = zoo.create(str(tmp_path))
    assert (model.preprocess.mean, model.preprocess.std) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_rescale", False),
        ("do_resize", False),
        ("do_center_crop", False),
        ("rescale_factor", 1 / 127.5),
        ("resample", 3),
        ("crop_size", {"height": 16, "width": 16}),
    ],
)
def test_preprocessing_that_dvexport_does_not_do(tmp_path, key, value):
    save_videomae(tmp_path)
    edit_config(tmp_path, "preprocessor_config.json", **{key: value})
    with pytest.raises(CheckpointError, match=f"the preprocessing has {key}="):
        zoo.create(str(tmp_path))


def test_settings_and_labels(tmp_path):
    oracle = save_videomae(tmp_path)
    pruned = zoo.create(str(tmp_path), labels=["a", "b", "c"], **{"sta.r": "1", "sta.groups": "2,1,1"})
    assert pruned.labels == ["a", "b", "c"]
    assert [stage.keep for stage in pruned.token_groups] == [3, 5, 4]
    assert close(pruned.without_pruning(), oracle)


def test_build_for_export_and_digest(tmp_path):
    save_videomae(tmp_path)
    source = build_model(str(tmp_path), None, {"sta.r": "1", "sta.groups": "2,1,1"})
    assert source.name == "huggingface"
    assert source.digest == file_digest(tmp_path)
    assert build_model("huggingface", tmp_path, {}).digest == source.digest
    config = tmp_path / "config.json"
    config.write_text(config.read_text() + " ")
    assert file_digest(tmp_path) != source.digest


@pytest.mark.parametrize(
    ("damage", "what", "why"),
    [
        (lambda d: (d / "config.json").unlink(), "holds no model of Hugging Face", "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "can't read a file", "Expecting"),
        (lambda d: (d / "config.json").write_text("[]"), "can't read a file", "no JSON object"),
        (lambda d: (d / "model.safetensors").unlink(), "holds no weights", "model.safetensors"),
        (lambda d: edit_config(d, architectures=["VideoMAEForPreTraining"]), "does not read", "VideoMAEForPreTraining"),
        (lambda d: edit_config(d, model_type="vivit", architectures=["Vivit"]), "does not read", "Vivit"),
        (lambda d: edit_config(d, hidden_act="relu"), "hidden_act=relu", "gelu is read"),
        (lambda d: edit_config(d, hidden_size=25), "describes no VideoMAE", "not a multiple"),
        (lambda d: edit_config(d, patch_size=[16, 8]), "describes no VideoMAE", ""),
        (
            lambda d: edit_config(d, num_hidden_layers=4),
            "don't fit config.json",
            "15 missing: videomae.encoder.layer.3",
        ),
        (
            lambda d: edit_config(d, num_hidden_layers=2),
            "don't fit config.json",
            "15 left over: videomae.encoder.layer.2",
        ),
        (lambda d: edit_config(d, hidden_size=48), "don't fit the model", "of another shape"),
        (lambda d: edit_config(d, id2label={"0": "a", "2": "b", "3": "c"}), "not numbered from 0", "1"),
        (lambda d: edit_weights(d, lambda k: k.pop(BIAS)), "don't fit config.json", f"1 missing: {BIAS}"),
        (lambda d: edit_weights(d, lambda k: k.update(x=k[BIAS] + 0)), "don't fit config.json", "1 left over: x"),
        (lambda d: edit_weights(d, lambda k: k[BIAS].fill_(float("nan"))), "NaN or infinite", "24 of 24"),
        (
            lambda d: edit_config(d, "preprocessor_config.json", size={"height": 32, "width": 32}),
            "the preprocessing",
            "shortest_edge",
        ),
    ],
)
def test_a_directory_that_is_not_as_it_should_be(tmp_path, damage, what, why):
    save_videomae(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError) as error:
        zoo.create(str(tmp_path))
    assert what in error.value.what
    assert why in (error.value.why or "")


@pytest.mark.parametrize("damage", ["absent", "elsewhere", "empty"])
def test_shards_that_are_not_there(tmp_path, damage):
    save_videomae(tmp_path, shards="20KB")
    index = tmp_path / "model.safetensors.index.json"
    if damage == "absent":
        next(tmp_path.glob("model-*.safetensors")).unlink()
    else:
        index.write_text(json.dumps({"weight_map": {"x": "../model.safetensors"} if damage == "elsewhere" else {}}))
    with pytest.raises(CheckpointError, match=r"can't read the checkpoint|names no files beside it"):
        zoo.create(str(tmp_path))


def test_a_weight_in_two_shards(tmp_path):
    save_videomae(tmp_path, shards="20KB")
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    keys = {**load_file(second), **{key: value + 1 for key, value in load_file(first).items()}}
    save_file(keys, second)
    with pytest.raises(CheckpointError, match="a weight stands in two files"):
        zoo.create(str(tmp_path))


def test_settings_that_contradict_the_directory(tmp_path):
    save_videomae(tmp_path)
    with pytest.raises(UsageError, match="heads=6 contradicts the directory") as error:
        zoo.create(str(tmp_path), heads=6)
    assert "heads=3" in error.value.why
    assert zoo.create(str(tmp_path), heads=3).config.heads == 3
    with pytest.raises(UsageError, match="a directory holds its own weights"):
        zoo.create(str(tmp_path), tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"sta\.r=3 is too large"):
        zoo.create(str(tmp_path), **{"sta.r": 3, "sta.groups": "2,1,1"})
    with pytest.raises(UsageError, match="a clip of 2 frames of tokens can't be joined to 8 groups"):
        load_directory(tmp_path, {"sta.r": 1})


def test_weights_without_their_config(tmp_path):
    save_videomae(tmp_path)
    with pytest.raises(CheckpointError, match=r"need its config.json") as error:
        zoo.create("vit_small", tmp_path / "model.safetensors")
    assert "dvexport export DIR" in error.value.hint


def test_no_such_directory():
    with pytest.raises(UsageError, match="no such directory"):
        zoo.create("models/that/is/absent")
    with pytest.raises(UsageError, match="needs its directory"):
        zoo.create("huggingface")


def test_the_command_line_leaves_nothing_behind(tmp_path):
    save_videomae(tmp_path)
    edit_config(tmp_path, num_hidden_layers=4)
    out = tmp_path / "out.dvx"
    command = [
        sys.executable,
        "-m",
        "dvexport",
        "export",
        str(tmp_path),
        "--backend",
        "onnx",
        "--mode",
        "clip",
        "-o",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "don't fit config.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_a_bundle_is_verified_against_its_directory(tmp_path, capsys):
    from dvexport.cli import main

    out, settings = tmp_path / "out.dvx", ["--set", "sta.r=1", "--set", "sta.groups=2,1,1"]
    save_videomae(tmp_path / "saved")
    save_videomae(tmp_path / "other", num_attention_heads=6)

    def call(*arguments):
        with pytest.raises(SystemExit) as left:
            main([str(each) for each in arguments])
        return left.value.code, capsys.readouterr()

    assert call("export", tmp_path / "saved", *settings, "--backend", "onnx", "-o", out)[0] == 0
    code, text = call("verify", out)
    assert code == 0 and "note: not compared with PyTorch: give --checkpoint" in text.out
    code, text = call("verify", out, "--checkpoint", tmp_path / "saved")
    assert code == 0
    assert "PyTorch: logits" in text.out and "PyTorch: tokens that differ" in text.out
    code, text = call("verify", out, "--checkpoint", tmp_path / "other")
    assert code == 2 and "not the checkpoint that the bundle was made from" in text.err
    code, text = call("verify", out, "--checkpoint", tmp_path / "absent")
    assert code == 2 and "can't be read" in text.err
