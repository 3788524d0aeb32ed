"""Bad input of transformers at the command line: one clear error each, exit code 2, and nothing left behind."""

import sys
from types import ModuleType

import official_layouts as official
import pytest
from sample_transformers import BIAS, edit_config, edit_weights, keys_of_width, save_videomae, small_swin
from toy_transformer import toy

from dvexport.cli import main
from dvexport.models.config import StaSettings
from dvexport.models.pruning import sta


@pytest.fixture
def refused(capsys, tmp_path):
    """Return a function that exports, expects a refusal and returns its text."""
    out = tmp_path / "out"
    out.mkdir()

    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            main(["export", *map(str, arguments), "--backend", "onnx", "-o", str(out / "x.dvx")])
        text = capsys.readouterr().err
        assert left.value.code == 2, text
        assert text.count("error:") == 1
        assert "Traceback" not in text
        assert not list(out.iterdir())
        return text

    return run


def test_a_transformer_that_the_rewrite_does_not_recognise(refused, monkeypatch):
    """What was looked for, what was found."""
    module = ModuleType("other_models")

    def make():
        net = toy(drop=0)
        sta.prune(net, grid=(2, 3, 4), settings=StaSettings(r=3, groups=(2, 1, 1)), blocks="encoder.layers", heads=2)
        return net

    module.make = make
    monkeypatch.setitem(sys.modules, "other_models", module)
    text = refused("other_models:make")
    assert "does not recognise this transformer" in text
    assert "looked for 'encoder.layers', the list of blocks; found embed, blocks, norm, head" in text


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["vit_small", "--set", "sta.r=500"], "sta.r=500 is too large: a group of pruning 0 has 196 tokens"),
        (["video_swin_tiny", "--set", "sta.r=800"], "stage 2 has 784 tokens a frame"),
        (["vit_small", "--set", "sta.r=48", "--set", "frames=10"], "5 frames of tokens can't be joined to 8 groups"),
        (["vit_small", "--set", "frames=15"], "frames=15 are not whole tubelets"),
        (["video_swin_tiny", "--set", "frames=31"], "frames=31 are not whole patches"),
    ],
)
def test_settings_that_do_not_fit(refused, arguments, what):
    assert what in refused(*arguments)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda d: edit_weights(d, lambda keys: keys.pop(BIAS)), f"1 missing: {BIAS}"),
        (lambda d: edit_weights(d, lambda keys: keys.update(more=keys[BIAS] + 0)), "1 left over: more"),
        (lambda d: edit_config(d, num_hidden_layers=2), "left over"),
        (lambda d: (d / "model.safetensors").write_bytes(b"no weights"), "try: download or copy it again"),
    ],
)
def test_a_directory_with_missing_or_extra_weights(refused, tmp_path, damage, what):
    save_videomae(tmp_path / "saved")
    damage(tmp_path / "saved")
    assert what in refused(tmp_path / "saved")


def test_an_ambiguous_head_count(refused, tmp_path):
    path = official.save(tmp_path / "small.pth", keys_of_width(384), wrapped="module")
    text = refused("vit_small", "--checkpoint", path)
    assert "nothing in the checkpoint tells heads, frames, size" in text
    settings = "--set heads=6 --set frames=16 --set size=224x224"
    assert f"try: dvexport export vit_small --checkpoint {path} {settings} --backend onnx -o " in text


def test_a_checkpoint_of_another_size(refused, tmp_path):
    path = official.save(tmp_path / "small.pth", keys_of_width(384), wrapped="module")
    assert "another model than vit_base" in refused("vit_base", "--checkpoint", path)
    keys = official.swin_keys(small_swin(window="8,7,7").float())
    path = official.save(tmp_path / "swin.pth", keys, wrapped="state_dict")
    assert "another model than video_swin_tiny" in refused("video_swin_tiny", "--checkpoint", path)
