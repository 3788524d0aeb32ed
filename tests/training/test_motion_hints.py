"""What helps a transformer to learn motion: where it starts, and what the data set tells of the object."""

import pytest
import torch

from dvexport.models import zoo
from dvexport.models.training.evaluate import normalised
from dvexport.models.training.motion import CLASSES, MotionDataset, mirror_images
from dvexport.models.training.motion_hints import Hints, object_motion, scale_blocks, whiten_embedding


def tiny(**options):
    return zoo.create(
        "vit_small", depth=3, embed_dim=12, heads=2, patch=8, size=32, frames=4, classes=12, sta_groups=(2, 1, 1),
        **options,
    )  # fmt: skip


def test_whitened_tubelets_vary_by_one_and_apart():
    model = tiny()
    frames = normalised(MotionDataset("train", 32, 4).batch(list(range(24)))[0], model)
    whiten_embedding(model, frames)
    with torch.no_grad():
        tokens = model.patch_embed(frames).flatten(0, 1)
    spread = torch.cov(tokens.T)
    # Sums and differences of the two frames: each half is white in itself.
    assert torch.allclose(spread[:6, :6], torch.eye(6), atol=0.02)
    assert torch.allclose(spread[6:, 6:], torch.eye(6), atol=0.02)
    still = frames[::2].repeat_interleave(2, 0)
    with torch.no_grad():
        tokens = model.patch_embed(still)
    assert tokens[..., 6:].abs().max() < 1e-3 < tokens[..., :6].std()


def test_a_gain_scales_the_linear_weights_of_the_blocks_alone():
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scale_blocks(model, 5.0)
    ratio = {name: (tensor.norm() / before[name].norm()).item() for name, tensor in model.state_dict().items()}
    for name, expected in (("attn.qkv", 5), ("mlp.fc1", 5), ("attn.proj", 3), ("mlp.fc2", 3)):
        assert ratio[f"blocks.2.{name}.weight"] == pytest.approx(expected)
    assert ratio["head.weight"] == ratio["patch_embed.proj.weight"] == ratio["blocks.0.norm1.weight"] == 1


def test_hints_tell_where_the_object_is_and_how_it_moves():
    data = MotionDataset("train", 48, 16)
    for name, axis in (("move_right", 1), ("move_down", 2), ("rotate_clockwise", 3), ("approach", 4)):
        index = torch.tensor([CLASSES.index(name)])
        told = object_motion(data, index, (8, 12, 12), mirrored=False)
        assert told.shape == (1, 8, 12, 12, 5)
        speeds = told[0].sum((0, 1, 2))[1:]
        assert speeds.argmax() == axis - 1, name
        scene = data.scene(index)
        rows, columns = told[0, 0, ..., 0].sum(1), told[0, 0, ..., 0].sum(0)
        for found, centre in ((columns.argmax(), scene.x[0, 0]), (rows.argmax(), scene.y[0, 0])):
            assert abs((found + 0.5) / 6 - 1 - centre) < 0.25


def test_mirrored_hints_are_those_of_the_mirrored_motion():
    """Sums of the hints change sign as the classes change places."""
    data = MotionDataset("train", 48, 16)
    index = torch.arange(12)
    told = object_motion(data, index, (8, 4, 4), mirrored=True)
    _, labels = mirror_images(*data.batch(index))
    axes = {"move_right": (1, 1), "move_left": (1, -1), "move_down": (2, 1), "move_up": (2, -1), "approach": (4, 1),
            "recede": (4, -1), "rotate_clockwise": (3, 1), "rotate_counterclockwise": (3, -1)}  # fmt: skip
    assert len(told) == len(labels) == 96
    for image, label in zip(told, labels.tolist(), strict=True):
        axis, sign = axes.get(CLASSES[label], (1, 0))
        if sign:
            assert image[..., axis].sum() * sign > 0, CLASSES[label]


def test_hints_are_no_part_of_the_model_and_reach_all_of_it():
    model = tiny()
    keys = set(model.state_dict())
    hints = Hints(model)
    assert set(model.state_dict()) == keys
    data = MotionDataset("train", 32, 4)
    frames, _ = data.batch([0, 1])
    model.train()
    model(normalised(frames, model))
    hints.loss(data, torch.tensor([0, 1]), mirrored=False).backward()
    untouched = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert untouched == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
