"""Checkpoints in the layouts that the official VideoMAE, STA and Video-Swin code saves."""

import official_layouts as official
import pytest
import torch
from sample_transformers import keys_of_width

from dvexport.errors import CheckpointError, UntoldError, UsageError
from dvexport.models import zoo

VIT = {"depth": 2, "embed_dim": 24, "heads": 3, "size": 32, "frames": 4, "classes": 5}
SIZE = {"depth": 2, "embed_dim": 24}
INPUT = {"size": 32, "frames": 4}


def vit(**options):
    torch.manual_seed(0)
    model = zoo.create("vit_small", **{**VIT, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def same(loaded, original, frames=4):
    clip = torch.randn(frames, 3, 32, 32)
    with torch.no_grad():
        return torch.equal(loaded(clip), original(clip))


@pytest.mark.parametrize(("wrapped", "prefix"), [("module", ""), ("model", ""), (None, "module."), (None, "backbone.")])
def test_official_videomae(tmp_path, wrapped, prefix):
    model = vit(mlp_ratio=2.5, tubelet=4, patch=8)
    keys = {prefix + key: value for key, value in model.state_dict().items()}
    path = official.save(tmp_path / "checkpoint.pth", keys, wrapped=wrapped, epoch=49)
    loaded = zoo.create("vit_small", path, heads=3, **SIZE, **INPUT)
    assert loaded.config == model.config
    assert same(loaded, model)
    report = loaded.import_report
    assert report.layout == "official VideoMAE"
    assert report.inferred["tubelet"] == 4
    assert report.assumed == {}
    assert report.given == {"heads": 3, "size": (32, 32), "frames": 4}
    with pytest.raises(UntoldError, match="tells frames, size"):
        zoo.create("vit_small", path, heads=3, **SIZE)


def test_pruning_needs_no_other_weights(tmp_path):
    model = vit()
    path = official.save(tmp_path / "checkpoint.pth", model.state_dict(), wrapped="module")
    pruned = zoo.create(
        "vit_small", path, heads=3, **SIZE, **INPUT, **{"sta.r": 1, "sta.groups": "2,1", "sta.stages": "0,1",
                                                        "sta.direction": "forward,reverse"},
    )  # fmt: skip
    assert same(pruned.without_pruning(), model)


def test_a_file_with_its_position_table(tmp_path):
    model = vit()
    keys = {**model.state_dict(), "pos_embed": model.positions}
    path = official.save(tmp_path / "checkpoint.pth", keys, wrapped="model")
    assert same(zoo.create("vit_small", path, heads=3, **SIZE, **INPUT), model)
    with pytest.raises(UsageError, match="frames=8 size=32x32 contradict the checkpoint") as error:
        zoo.create("vit_small", path, heads=3, **SIZE, **{**INPUT, "frames": 8})
    assert "positions for 8 tokens, and these are 16" in error.value.why


def test_learned_positions_are_refused(tmp_path):
    """Dropping them would leave a model with the positions of another one."""
    model = vit()
    keys = {**model.state_dict(), "pos_embed": model.positions + torch.randn(24)}
    path = official.save(tmp_path / "checkpoint.pth", keys, wrapped="model")
    with pytest.raises(CheckpointError, match="positions of its own") as error:
        zoo.create("vit_small", path, heads=3, **SIZE, **INPUT)
    assert "use_learnable_pos_emb" in error.value.why


def test_head_count_is_asked_where_files_differ(tmp_path):
    path = official.save(tmp_path / "small.pth", keys_of_width(384), wrapped="module")
    with pytest.raises(UntoldError, match="tells heads, frames, size") as error:
        zoo.create("vit_small", path)
    assert "6   official ViT-S" in error.value.why
    assert "16  ViT-S as converted" in error.value.why
    assert error.value.settings == ["heads=6", "frames=16", "size=224x224"]
    assert "--set heads=6 --set frames=16 --set size=224x224" in error.value.hint
    for heads in (6, 16):
        assert zoo.create("vit_small", path, heads=heads, assume_defaults=True).config.heads == heads


def test_head_count_of_other_widths_is_known(tmp_path):
    path = official.save(tmp_path / "base.pth", keys_of_width(768, depth=1), wrapped="module")
    assert zoo.create("vit_base", path, depth=1, assume_defaults=True).config.heads == 12
    with pytest.raises(UsageError, match="heads=6 contradicts the checkpoint"):
        zoo.create("vit_base", path, depth=1, heads=6)


def test_a_checkpoint_of_another_size_is_named(tmp_path):
    path = official.save(tmp_path / "small.pth", keys_of_width(384), wrapped="module")
    with pytest.raises(CheckpointError, match="another model than vit_base") as error:
        zoo.create("vit_base", path)
    assert "embed_dim=384" in error.value.why
    assert error.value.hint == "use vit_small, the most likely model"
    path = official.save(tmp_path / "tiny.pth", vit().state_dict())
    with pytest.raises(CheckpointError, match="another model than vit_small") as error:
        zoo.create("vit_small", path)
    assert "give its size" in error.value.hint
    with pytest.raises(CheckpointError, match="another model than tsn_resnet18") as error:
        zoo.create("tsn_resnet18", path)
    assert "a vit" in error.value.why


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda k: k.pop("blocks.1.attn.q_bias"), "1 missing: blocks.1.attn.q_bias"),
        (lambda k: k.update({"blocks.0.gamma_1": torch.ones(24)}), "1 unexpected: blocks.0.gamma_1"),
        (lambda k: k.update({"head.bias": torch.ones(6)}), r"head.bias \(6,\) instead of \(5,\)"),
        (lambda k: k.pop("head.weight"), "head.weight"),
        (lambda k: k.update({"patch_embed.proj.weight": torch.ones(24, 3, 16, 16)}), "instead of 5 axes"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, what):
    keys = dict(vit().state_dict())
    change(keys)
    path = official.save(tmp_path / "checkpoint.pth", keys, wrapped="module")
    with pytest.raises(CheckpointError, match=what):
        zoo.create("vit_small", path, heads=3, **SIZE, **INPUT)
