"""Weights as training code leaves them: under keys, behind prefixes, beside objects of unknown classes."""

from __future__ import annotations

import argparse
import datetime
import os
import pickle
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import official_layouts as official
import pytest
import torch

from dvexport.errors import CheckpointError, UsageError
from dvexport.models import zoo
from dvexport.models.checkpoints.checkpoint import read_checkpoint

WEIGHTS = {"conv.weight": torch.ones(2, 3), "fc.bias": torch.arange(3.0)}


def saved(tmp_path, content, **how):
    torch.save(content, tmp_path / "w.pth", **how)
    return tmp_path / "w.pth"


def prefixed(prefix, state=WEIGHTS):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    ("prefix", "taken"),
    [
        ("module.", "module."),
        ("_orig_mod.", "_orig_mod."),
        ("module._orig_mod.", "module._orig_mod."),
        ("model.", "model."),
        ("model.module.", "model.module."),
        ("ema_model.module.", "ema_model.module."),
        ("encoder.", ""),
    ],
)
def test_prefixes_of_wrappers_are_taken_off_and_told(tmp_path, prefix, taken):
    found = read_checkpoint(saved(tmp_path, {"state_dict": prefixed(prefix)})).found
    assert found.prefix == taken
    assert set(found.state) == set(prefixed(prefix[len(taken) :]))
    assert found.lines() == ["the weights are those under 'state_dict'"] + (
        [f"'{taken}' was taken off every name"] if taken else []
    )


def test_a_prefix_of_some_names_stays(tmp_path):
    state = {**prefixed("model."), "criterion.weight": torch.ones(1)}
    assert set(read_checkpoint(saved(tmp_path, state)).state) == set(state)


def test_safetensors_have_prefixes_too(tmp_path):
    from safetensors.torch import save_file

    save_file(prefixed("module."), tmp_path / "w.safetensors")
    assert set(read_checkpoint(tmp_path / "w.safetensors").state) == set(WEIGHTS)


def test_averaged_models_count(tmp_path):
    state = {"n_averaged": torch.tensor(5), **prefixed("module.")}
    assert set(read_checkpoint(saved(tmp_path, state)).state) == set(WEIGHTS)


def test_one_of_two_sets_is_chosen_by_its_key(tmp_path):
    twice = {name: 2 * value for name, value in WEIGHTS.items()}
    path = saved(tmp_path, {"model": WEIGHTS, "model_ema": prefixed("module.", twice), "epoch": 3})
    with pytest.raises(CheckpointError, match="two sets of weights") as caught:
        read_checkpoint(path)
    assert "--weights-key model, or --weights-key model_ema" in caught.value.hint
    for key, factor in (("model", 1), ("model_ema", 2)):
        checkpoint = read_checkpoint(path, key)
        assert torch.equal(checkpoint.state["fc.bias"], factor * WEIGHTS["fc.bias"])
        assert checkpoint.found.key == key
    assert checkpoint.found.others == {"model": "dictionary of 2, 2 of them tensors", "epoch": "int"}


def test_a_key_inside_another(tmp_path):
    path = saved(tmp_path, {"ema": {"state_dict": WEIGHTS}, "state_dict": WEIGHTS})
    assert read_checkpoint(path, "ema.state_dict").found.key == "ema.state_dict"
    for wrong in ("ema.model", "nothing", "epoch", "", "."):
        with pytest.raises(UsageError, match=f"no weights under '{wrong}'") as caught:
            read_checkpoint(path, wrong)
        assert "ema.state_dict, state_dict" in caught.value.why
    with pytest.raises(UsageError, match="no weights under 'model'") as caught:
        read_checkpoint(saved(tmp_path, WEIGHTS), "model")
    assert "it holds one set, without a key" in caught.value.why


@pytest.mark.parametrize("name", [1, (1, 2), None])
def test_names_that_are_no_text(tmp_path, name):
    with pytest.raises(CheckpointError, match="no plain state_dict") as caught:
        read_checkpoint(saved(tmp_path, {**WEIGHTS, name: torch.ones(1)}))
    assert caught.value.why == f"{name!r} stands where a name should"


class _Ran:
    """What would write a file if its pickle were believed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def mmengine_like():
    """Objects of modules that are not installed, as mmengine leaves them: a dict with attributes, a log with arrays."""
    module = ModuleType("mmengine")
    module.__path__ = []
    log = ModuleType("mmengine.logging")

    class HistoryBuffer:
        def __init__(self):
            self.values = np.arange(3.0)

    class ConfigDict(dict):
        pass

    for kind in (HistoryBuffer, ConfigDict):
        kind.__module__, kind.__qualname__ = "mmengine.logging", kind.__name__
        setattr(log, kind.__name__, kind)
    return {"mmengine": module, "mmengine.logging": log}, HistoryBuffer(), ConfigDict(lr=0.1, steps=[1, 2])


@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_what_stands_beside_weights_is_skipped(tmp_path, monkeypatch, how):
    modules, log, config = mmengine_like()
    beside = {
        "args": argparse.Namespace(lr=0.1, model="vit", path=os.fspath(tmp_path)),
        "more": SimpleNamespace(a={1, 2}),
        "when": datetime.datetime(2026, 1, 1),
        "log": {"loss": log},
        "config": config,
        "array": np.arange(4),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    path = saved(tmp_path, {"model": WEIGHTS, **beside}, **how)
    for name in modules:
        monkeypatch.delitem(sys.modules, name)
    checkpoint = read_checkpoint(path)
    assert {name: value.tolist() for name, value in checkpoint.state.items()} == {
        name: value.tolist() for name, value in WEIGHTS.items()
    }
    assert checkpoint.found.others["args"] == "argparse.Namespace"
    assert checkpoint.found.others["config"] == "mmengine.logging.ConfigDict"
    assert "mmengine" not in sys.modules


@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
@pytest.mark.parametrize("beside", [True, False])
def test_what_could_run_is_refused_and_does_not(tmp_path, how, beside):
    content = {"args": argparse.Namespace(a=1), "model": WEIGHTS, "run": _Ran(tmp_path / "ran")}
    path = saved(tmp_path, content if beside else {"model": WEIGHTS, "run": _Ran(tmp_path / "ran")}, **how)
    with pytest.raises(CheckpointError, match="would run code") as caught:
        read_checkpoint(path)
    assert "open" in caught.value.why
    assert not (tmp_path / "ran").exists()


def test_an_object_of_code_that_is_not_known_is_refused(tmp_path):
    class Mine:
        pass

    Mine.__module__, Mine.__qualname__ = "mine", "Mine"
    module = ModuleType("mine")
    module.Mine = Mine
    sys.modules["mine"] = module
    try:
        path = saved(tmp_path, {"model": WEIGHTS, "args": argparse.Namespace(), "mine": Mine()})
    finally:
        del sys.modules["mine"]
    with pytest.raises(CheckpointError, match="would run code") as caught:
        read_checkpoint(path)
    assert "mine.Mine" in caught.value.why


def test_damage_behind_what_is_skipped_is_told(tmp_path):
    path = tmp_path / "w.pth"
    data = pickle.dumps({"args": argparse.Namespace(a=1), "model": {}})
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


def test_the_weights_of_a_model_are_chosen_by_their_key(tmp_path):
    model, other = (zoo.create("tsn_resnet18", width=0.125, classes=3, size=32) for _ in range(2))
    with torch.no_grad():
        other.fc.bias.fill_(7)
    path = saved(tmp_path, {"state_dict": official.tsm_keys(model), "ema": official.tsm_keys(other)})
    options = {"frames": 8, "size": 32}
    assert zoo.create("tsn_resnet18", path, weights_key="ema", **options).fc.bias.tolist() == [7, 7, 7]
    assert zoo.create("tsn_resnet18", path, weights_key="state_dict", **options).fc.bias.tolist() != [7, 7, 7]
    with pytest.raises(UsageError, match="a weights key is for a checkpoint"):
        zoo.create("tsn_resnet18", weights_key="ema")
