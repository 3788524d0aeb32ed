"""`dvexport checkpoint`: what it says of every layout, of files that are none, and of what stands beside weights."""

from __future__ import annotations

import argparse
import json

import official_layouts as official
import pytest
import torch
from sample_transformers import keys_of_width, save_videomae

from dvexport.models import zoo
from dvexport.models.checkpoints.checkpoint import save_checkpoint

SMALL = {"width": 0.125, "classes": 3, "size": 32}


@pytest.fixture
def said(call, tmp_path):
    """Return a function that saves what it is given and returns what the command says of it, as JSON."""

    def run(content, *arguments):
        path = tmp_path / "w.pth"
        torch.save(content, path)
        code, out, err = call("checkpoint", path, "--json", *arguments)
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.mark.parametrize(
    ("name", "keys", "layout", "untold"),
    [
        ("tsm_resnet18", official.tsm_keys, "official TSM / TSN", {"shift_div", "frames", "size", "shift"}),
        ("tsn_resnet18", official.tsm_keys, "official TSM / TSN", {"frames", "size"}),
        ("adafuse_resnet18", official.adafuse_keys, "official AdaFuse / D-STEP", {"shift", "frames", "size"}),
        ("dstep_resnet18", official.adafuse_keys, "official AdaFuse / D-STEP", {"shift", "frames", "size"}),
    ],
)
def test_official_layouts(said, name, keys, layout, untold):
    found = said({"state_dict": keys(zoo.create(name, **SMALL)), "epoch": 1, "args": argparse.Namespace(lr=1)})
    assert (found["layout"], found["model"]) == (layout, name)
    assert found["weights"] == ["the weights are those under 'state_dict'", "'module.' was taken off every name"]
    assert {"classes=3", "depth=18"} <= set(found["told"])
    assert untold <= set(found["untold"])
    assert found["others"] == {"epoch": "int", "args": "argparse.Namespace"}


def test_transformers(said):
    found = said({"module": keys_of_width(384)})
    assert (found["layout"], found["model"]) == ("official VideoMAE", "vit_small")
    assert set(found["untold"]) == {"heads", "frames", "size"}


def test_a_directory(call, tmp_path):
    save_videomae(tmp_path)
    code, out, _ = call("checkpoint", tmp_path)
    assert code == 0
    assert "VideoMAEForVideoClassification" in out and f"next: dvexport export {tmp_path} -o OUT.dvx" in out


def test_our_own(call, tmp_path):
    model = zoo.create("dstep_resnet18", **SMALL)
    save_checkpoint(tmp_path / "own.safetensors", model, architecture="dstep_resnet18")
    code, out, _ = call("checkpoint", tmp_path / "own.safetensors")
    assert code == 0
    assert "dstep_resnet18" in out and "width=0.125" in out


def test_a_model_that_nobody_knows(said):
    found = said({"model": {f"layers.{i}.weight": torch.ones(2) for i in range(9)}, "optimizer": {"lr": 1}})
    assert (found["layout"], found["model"], found["tensors"], found["parameters"]) == ("", "", 9, 18)
    assert found["names"] == [f"layers.{i}.weight" for i in range(5)]
    assert "fit no model that dvexport has" in found["why"]


def test_the_command_that_follows(call, tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": official.tsm_keys(zoo.create("tsm_resnet18", **SMALL)), "b": {}}, path)
    code, out, _ = call("checkpoint", path, "--weights-key", "a")
    assert code == 0
    assert f"next: dvexport export tsm_resnet18 --checkpoint {path} --weights-key a --set " in out


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\3\4"])
def test_what_is_no_checkpoint(call, tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    code, _, err = call("checkpoint", tmp_path / "w.pth")
    assert (code, err.count("error:")) == (2, 1)
