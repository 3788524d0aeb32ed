"""Video Swin against its official equations, pruned and not."""

import itertools
import math

import official_layouts as official
import pytest
import sta_reference
import torch
import torch.nn.functional as F
from sample_transformers import SWIN, WINDOWED, small_swin

from dvexport import gates
from dvexport.errors import CheckpointError, UsageError
from dvexport.models import zoo
from dvexport.models.networks import video_swin
from dvexport.tokens import survivors


def norm(x, state, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def attend(x, state, heads, window, full, shift, kept):
    """Official window attention on `[D, H, W, C]`, one window at a time, with padding, rolling and region numbers."""
    size = x.shape[:3]
    padded = [-(-s // w) * w for s, w in zip(size, window, strict=True)]
    channels, width = x.shape[3], x.shape[3] // heads
    pads = [p - s for p, s in zip(padded, size, strict=True)]
    x = F.pad(x, (0, 0, 0, pads[2], 0, pads[1], 0, pads[0]))
    alive = F.pad(kept, (0, pads[2], 0, pads[1], 0, pads[0]), value=True)
    rows = (x @ state["qkv.weight"].T + state["qkv.bias"]) * alive[..., None]
    region = torch.zeros(padded)
    if any(shift):
        cuts = [
            (slice(0, -w), slice(-w, -s), slice(-s, None)) if s else (slice(None),)
            for w, s in zip(window, shift, strict=True)
        ]
        for number, part in enumerate(itertools.product(*cuts)):
            region[part] = number
    back = [-s for s in shift]
    rows, alive = rows.roll(back, (0, 1, 2)), alive.roll(back, (0, 1, 2))
    out = torch.zeros_like(x)
    places = list(itertools.product(*(range(w) for w in window)))
    whole = list(itertools.product(*(range(w) for w in full)))[: len(places)]  # the official [:N, :N]
    index = [[sum((p[a] - q[a] + full[a] - 1) * math.prod(2 * f - 1 for f in full[a + 1 :]) for a in range(3))
              for q in whole] for p in whole]  # fmt: skip
    bias = state["relative_position_bias_table"][torch.tensor(index)]
    for corner in itertools.product(*(range(0, p, w) for p, w in zip(padded, window, strict=True))):
        at = tuple(slice(c, c + w) for c, w in zip(corner, window, strict=True))
        query, key, value = rows[at].reshape(-1, 3 * channels).split(channels, 1)
        number, seen = region[at].flatten(), alive[at].flatten()
        parts = []
        for head in range(heads):
            own = slice(head * width, head * width + width)
            logits = query[:, own] @ key[:, own].T / math.sqrt(width) + bias[:, :, head]
            logits = logits - 100 * (number[:, None] != number[None]) - 100 * ~seen
            parts.append(logits.softmax(1) @ value[:, own])
        out[at] = torch.cat(parts, 1).reshape(*window, channels)
    out = out.roll(list(shift), (0, 1, 2))[: size[0], : size[1], : size[2]]
    return out @ state["proj.weight"].T + state["proj.bias"]


def mask(alive, size):
    return torch.zeros(math.prod(size), dtype=torch.bool).index_fill(0, torch.tensor(alive), True).reshape(size)


def inherited(x, lost, r):
    """Places left of each frame: whole tokens before those with dropped members, strong ones before weak ones."""
    frames, tokens = x.shape[0], x.shape[1] * x.shape[2]
    alive = []
    for frame in range(frames):
        strength = x[frame].abs().sum(2).flatten().tolist()
        members = lost[frame].flatten().tolist()
        ranked = sorted(range(tokens), key=lambda i: (members[i], -strength[i], i))
        alive += [frame * tokens + i for i in ranked[: tokens - r]]
    return alive


def literal(model, clip):
    """The official forward pass of one clip, and the documented pruning."""
    config, state = model.config, model.state_dict()
    clip = F.pad(clip.transpose(0, 1), (0, -clip.shape[3] % 4, 0, -clip.shape[2] % 4))
    x = F.conv3d(clip[None], state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=config.patch)
    x = norm(x[0].permute(1, 2, 3, 0), state, "patch_embed.norm")
    lost = None
    for stage, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True)):
        size = x.shape[:3]
        alive = list(range(math.prod(size)))
        if lost is not None:
            alive = inherited(x, lost, {2: config.sta_r // 4, 3: config.sta_r // 8}[stage])
        kept = mask(alive, size)
        window = [min(w, s) for w, s in zip(config.window, size, strict=True)]
        for block in range(depth):
            part = {
                k.removeprefix(p): v for k, v in state.items() if k.startswith(p := f"layers.{stage}.blocks.{block}.")
            }
            attn = {k.removeprefix("attn."): v for k, v in part.items() if k.startswith("attn.")}
            r, first = {1: (config.sta_r, 0), 2: (config.sta_r // 4, depth // 2)}.get(stage, (0, -1))
            if r and block == first:
                channels = x.shape[3]
                keys = norm(x, part, "norm1") @ attn["qkv.weight"][channels : 2 * channels].T
                keys = (keys + attn["qkv.bias"][channels : 2 * channels]).reshape(-1, heads, channels // heads).mean(1)
                tokens = x.reshape(-1, channels)[alive].tolist()
                places = sta_reference.drop(tokens, keys[alive].tolist(), size[0], r, reverse=stage == 2)
                alive = [alive[place] for place in places]
                kept = mask(alive, size)
            shift = [w // 2 if block % 2 and s > w else 0 for w, s in zip(config.window, size, strict=True)]
            y = x + attend(norm(x, part, "norm1"), attn, heads, window, config.window, shift, kept)
            z = norm(y, part, "norm2") @ part["mlp.fc1.weight"].T + part["mlp.fc1.bias"]
            z = y + F.gelu(z) @ part["mlp.fc2.weight"].T + part["mlp.fc2.bias"]
            x = torch.where(kept[..., None], z, x)
        if stage < 3:
            if len(alive) < kept.numel():
                gone = F.pad((~kept).int(), (0, size[2] % 2, 0, size[1] % 2))
                lost = gone[:, 0::2, 0::2] + gone[:, 1::2, 0::2] + gone[:, 0::2, 1::2] + gone[:, 1::2, 1::2]
            x = F.pad(x, (0, 0, 0, size[2] % 2, 0, size[1] % 2))
            x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], 3)
            x = norm(x, state, f"layers.{stage}.downsample.norm")
            x = x @ state[f"layers.{stage}.downsample.reduction.weight"].T
    return norm(x, state, "norm").mean((0, 1, 2)) @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": "8,7,7"},
        {"window": "2,2,2"},
        {"window": "3,3,5", "size": "44x50"},
        {"sta.r": "16"},
        {"sta.r": "16", "window": "2,2,3"},
        {"sta.r": "16", "window": "3,3,5", "size": "48x56"},
    ],
    ids=str,
)
def test_official_equations_and_the_documented_pruning(options):
    model = small_swin(**options)
    height, width = model.config.size
    frames = torch.randn(16, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        found = model(frames)
        assert found.shape == (2, 5)
        for clip in range(2):
            assert torch.allclose(found[clip], literal(model, frames[8 * clip : 8 * clip + 8]), atol=1e-9)


def test_without_pruning_is_the_dense_model_on_the_same_weights():
    model, plain = small_swin(**{"sta.r": 16}), small_swin()
    frames = torch.randn(8, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(model.without_pruning()(frames), plain(frames))
        assert not torch.equal(model(frames), plain(frames))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(p is q for p, q in zip(model.parameters(), model.without_pruning().parameters(), strict=True))


def test_decisions_tell_which_tokens_are_left_of_every_stage(monkeypatch):
    """Stage 2, stage 3 twice, stage 4: as the model itself gathers them."""
    places = []
    made = video_swin._survivors
    monkeypatch.setattr(video_swin, "_survivors", lambda x, kept: places.append(kept) or made(x, kept))
    model = small_swin(**{"sta.r": 16})
    with torch.no_grad(), gates.token_decisions() as chosen:
        model(torch.randn(8, 3, 64, 64, dtype=torch.float64))
    stages = [[stage.gate(group) for group in range(stage.groups)] for stage in model.token_groups]
    decisions = {(gate, "tokens"): index[0].numpy() for gate, index in chosen.items()}
    left = survivors(model.token_grid, stages, decisions, [stage.grid for stage in model.token_groups])
    assert [mask.shape for mask in left] == [(4, 8, 8), (4, 4, 4), (4, 4, 4), (4, 2, 2)]
    assert [int(mask.sum()) for mask in left] == [4 * 48, 4 * 12, 4 * 8, 4 * 2]
    for mask, kept in zip(left, places, strict=True):
        assert set(mask.ravel().nonzero()[0]) == set(kept[0].tolist())


def test_random_drop_keeps_as_many_and_is_decided_by_the_seed():
    frames, found = torch.randn(8, 3, 64, 64, dtype=torch.float64), []
    for options in ({}, {"sta.method": "random"}, {"sta.method": "random"}, {"sta.method": "random", "sta.seed": 1}):
        with torch.no_grad(), gates.token_decisions() as chosen:
            small_swin(**{"sta.r": 16, **options})(frames)
        found.append({gate: sorted(index[0].tolist()) for gate, index in chosen.items()})
    own, first, again, other = found
    assert first == again and first != other and first != own
    assert [{gate: len(index) for gate, index in each.items()} for each in (first, other)] == [
        {gate: len(index) for gate, index in own.items()}
    ] * 2


def test_masked_tokens_weigh_nothing_and_no_weight_is_subnormal(monkeypatch):
    """Arithmetic on subnormal numbers is many times slower, and a token can be masked for two reasons."""
    found = []

    def noted(logits, dim):
        weights = softmax(logits, dim)
        found.append(weights)
        return weights

    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", noted)
    model = zoo.create("video_swin_tiny", **{**SWIN, **WINDOWED, "sta.r": 16}).eval()
    with torch.no_grad():
        model(torch.randn(8, 3, 64, 64))
    attention = [weights for weights in found if weights.ndim == 4]
    masked = torch.cat([weights[weights < 1e-12] for weights in attention])
    assert len(masked) and masked.min() > 1e-30
    assert masked.max() < 1e-18 and all(torch.allclose(weights.sum(-1), torch.tensor(1.0)) for weights in attention)


@pytest.mark.parametrize(
    ("name", "millions"), [("video_swin_tiny", 28.2), ("video_swin_small", 49.8), ("video_swin_base", 88.1)]
)
def test_published_sizes(name, millions):
    with torch.device("meta"):
        model = zoo.create(name)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=5e-3)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"sta.r": 10}, "sta.r=10 does not fit Video-Swin: stage 2 has 64"),
        ({"sta.r": 48}, "sta.r=48 does not fit Video-Swin: stage 2 has 64"),
        ({"sta.r": -4}, "sta.r=-4 is out of range"),
        ({"depths": "2,2"}, "a number for each of 4 stages"),
        ({"heads": "3,2,2,4"}, "stage 1 has 8 channels, not whole 3 heads"),
        ({"frames": 7}, "frames=7 are not whole patches of 2"),
        ({"window": "0,7,7"}, "window=0x7x7 is out of range"),
        ({"sta.groups": "4"}, "unknown option 'sta.groups'"),
    ],
)
def test_options_that_do_not_fit(options, what):
    with pytest.raises(UsageError) as error:
        small_swin(**options)
    assert what in error.value.what


SIZE = {"embed_dim": 8, "depths": "1,2,2,1"}


def test_official_layout(tmp_path):
    model = small_swin(window="4,7,7").float()
    path = official.save(tmp_path / "swin.pth", official.swin_keys(model), wrapped="state_dict", meta={"epoch": 30})
    loaded = zoo.create("video_swin_tiny", path, frames=8, size=64, **SIZE)
    assert loaded.config == model.config
    frames = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(frames), model(frames))
    report = loaded.import_report
    assert report.layout == "official Video-Swin"
    assert report.inferred["window"] == (4, 7, 7)
    assert report.inferred["heads"] == (1, 2, 2, 4)
    assert report.assumed == {}


def test_a_checkpoint_of_another_size_or_with_missing_weights(tmp_path):
    keys = official.swin_keys(small_swin(window="8,7,7").float())
    path = official.save(tmp_path / "swin.pth", keys, wrapped="state_dict")
    with pytest.raises(CheckpointError, match="another model than video_swin_tiny") as error:
        zoo.create("video_swin_tiny", path)
    assert "embed_dim=8" in error.value.why
    with pytest.raises(CheckpointError, match="another model than vit_small"):
        zoo.create("vit_small", path)
    del keys["backbone.layers.1.blocks.1.attn.proj.bias"]
    path = official.save(tmp_path / "swin.pth", keys, wrapped="state_dict")
    with pytest.raises(CheckpointError, match=r"1 missing: backbone.layers.1.blocks.1.attn.proj.bias"):
        zoo.create("video_swin_tiny", path, frames=8, size=64, **SIZE)
