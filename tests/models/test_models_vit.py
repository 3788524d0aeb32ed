"""ViT for videos against its official equations."""

import math

import pytest
import torch
import torch.nn.functional as F

from dvexport.errors import UsageError
from dvexport.models import zoo
from dvexport.models.networks.vit import position_table

SMALL = {"depth": 2, "embed_dim": 24, "heads": 3, "size": (32, 64), "classes": 5, "frames": 4}


def small(**options):
    torch.manual_seed(1)
    model = zoo.create("vit_small", **{**SMALL, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def literal(model, clip):
    """The official equations, with Conv3d on `[B, C, T, H, W]` and one head at a time."""
    config, state = model.config, model.state_dict()
    x = F.conv3d(
        clip.transpose(1, 2), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"],
        stride=(config.tubelet, config.patch, config.patch),
    )  # fmt: skip
    x = x.flatten(2).transpose(1, 2) + model.positions
    width = config.embed_dim // config.heads
    for number in range(config.depth):
        part = {k.removeprefix(f"blocks.{number}."): v for k, v in state.items() if k.startswith(f"blocks.{number}.")}
        y = F.layer_norm(x, x.shape[2:], part["norm1.weight"], part["norm1.bias"], config.norm_eps)
        query, key, value = (y @ w.T for w in part["attn.qkv.weight"].chunk(3))
        query, value = query + part["attn.q_bias"], value + part["attn.v_bias"]
        heads = []
        for head in range(config.heads):
            at = slice(head * width, head * width + width)
            weights = (query[..., at] @ key[..., at].transpose(1, 2) / math.sqrt(width)).softmax(-1)
            heads.append(weights @ value[..., at])
        x = x + torch.cat(heads, 2) @ part["attn.proj.weight"].T + part["attn.proj.bias"]
        y = F.layer_norm(x, x.shape[2:], part["norm2.weight"], part["norm2.bias"], config.norm_eps)
        y = y @ part["mlp.fc1.weight"].T + part["mlp.fc1.bias"]
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + y @ part["mlp.fc2.weight"].T + part["mlp.fc2.bias"]
    x = F.layer_norm(x.mean(1), x.shape[2:], state["fc_norm.weight"], state["fc_norm.bias"], config.head_eps)
    return x @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize("options", [{}, {"tubelet": 1}, {"patch": 8, "tubelet": 4}, {"mlp_ratio": 1.5, "heads": 1}])
def test_official_equations(options):
    model = small(**options).double()
    clips = torch.randn(2, 4, 3, 32, 64, dtype=torch.float64)
    with torch.no_grad():
        found = model(clips.flatten(0, 1))
        assert found.shape == (2, 5)
        assert torch.allclose(found, literal(model, clips), atol=1e-10)


def test_positions_are_computed_in_double_precision():
    table = position_table(1568, 384)
    assert table.dtype == torch.float32
    for token, channel in ((0, 0), (1567, 0), (1567, 1), (1000, 37), (999, 382)):
        angle = token / 10000 ** (2 * (channel // 2) / 384)
        assert table[0, token, channel] == torch.tensor(math.cos(angle) if channel % 2 else math.sin(angle)).float()


def test_names_are_the_official_ones():
    keys = set(zoo.create("vit_small", **SMALL).state_dict())
    block = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q_bias", "attn.v_bias",
             "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias",
             "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]  # fmt: skip
    ends = ["patch_embed.proj.weight", "patch_embed.proj.bias", "fc_norm.weight", "fc_norm.bias",
            "head.weight", "head.bias"]  # fmt: skip
    assert keys == {f"blocks.{i}.{name}" for i in range(2) for name in block} | set(ends)


@pytest.mark.parametrize(
    ("name", "millions"), [("vit_small", 22.0), ("vit_base", 86.5), ("vit_large", 304.4), ("vit_huge", 631.9)]
)
def test_published_sizes(name, millions):
    with torch.device("meta"):
        model = zoo.create(name)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=5e-3)
    assert model.whole_clip
    assert not model.causal
    assert model.preprocess.frames == 16


def test_first_token_and_stochastic_depth():
    model = small(mean_pooling=False, drop_path=0.5)
    frames = torch.randn(4, 3, 32, 64)
    with torch.no_grad():
        assert torch.equal(model(frames), model.head(model.tokens(frames)[:, 0]))
        assert torch.equal(model(frames), model(frames))
        model.train()
        torch.manual_seed(0)
        assert len(model(frames.repeat(16, 1, 1, 1)).unique(dim=0)) > 1
    assert "norm.weight" in model.state_dict()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"heads": 5}, "embed_dim=24 is not a multiple of heads=5"),
        ({"frames": 5}, "frames=5 are not whole tubelets of 2"),
        ({"size": 40}, "size=40x40 is not whole patches of 16"),
        ({"depth": 0}, "depth=0 is out of range"),
        ({"dpeth": 3}, "unknown option 'dpeth'"),
    ],
)
def test_options_that_make_no_transformer(options, what):
    with pytest.raises(UsageError, match=what):
        small(**options)
