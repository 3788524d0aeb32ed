"""Pruning of tokens by STA: what it drops, against a literal reading of its description."""

import copy
import math

import pytest
import sta_reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dvexport.errors import UsageError
from dvexport.models import zoo
from dvexport.models.config import StaSettings
from dvexport.models.pruning import sta

SMALL = {"depth": 6, "embed_dim": 24, "heads": 3, "size": 64, "classes": 5}


def small(**options):
    torch.manual_seed(1)
    model = zoo.create("vit_small", **{**SMALL, **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("weight", "_bias")) and "norm" not in name:
                parameter.normal_(std=0.2)
    return model


def clips(count=1, frames=16):
    return torch.randn(count * frames, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@settings(deadline=None, max_examples=40)
@given(
    groups=st.integers(1, 5), size=st.integers(2, 11), channels=st.integers(1, 6), share=st.floats(0, 0.5),
    reverse=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_drops_what_the_description_says(groups, size, channels, share, reverse, seed):
    r = int(share * size)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, groups * size, channels, generator=generator, dtype=torch.float64)
    keys = torch.randn(2, groups * size, 3, generator=generator, dtype=torch.float64)
    stage = sta.PruningStage(0, 0, groups, size, size - r, "reverse" if reverse else "forward")
    found = sta.drop_tokens(x, keys, stage)
    for clip in range(2):
        places = sta_reference.drop(x[clip].tolist(), keys[clip].tolist(), groups, r, reverse)
        assert torch.equal(found[clip], x[clip, places])


@pytest.mark.parametrize("reverse", [False, True])
def test_constant_clip_drops_by_place(reverse):
    """Equal tokens give equal scores: the first ones stay, and nothing is NaN."""
    x = torch.arange(1.0, 33).reshape(1, 32, 1) * 0 + 2
    keys = torch.ones(1, 32, 4)
    stage = sta.PruningStage(0, 0, 4, 8, 5, "reverse" if reverse else "forward")
    numbered = torch.cat([x, -x], 2)
    places = sta_reference.drop(numbered[0].tolist(), keys[0].tolist(), 4, 3, reverse)
    first = 24 if reverse else 0
    assert [p for p in places if first <= p < first + 8] == [first + p for p in (1, 3, 5, 7, 0)]
    kept = sta.drop_tokens(numbered, keys, stage)
    assert kept.shape == (1, 20, 2)
    assert torch.isfinite(kept).all()


def literal(model, clip):
    """A forward pass of one clip whose tokens the reference drops."""
    x = model.patch_embed(clip) + model.positions
    stages = {stage.block: stage for stage in model.token_groups}
    for number, block in enumerate(model.blocks):
        read = block.norm1(x)
        x = block.mlp(block.norm2(y := x + block.attn(read))) + y
        if number in stages:
            stage, heads = stages[number], model.config.heads
            channels = read.shape[2]
            keys = (read @ block.attn.qkv.weight[channels : 2 * channels].T).reshape(x.shape[1], heads, -1).mean(1)
            reverse = stage.direction == "reverse"
            r = stage.tokens - stage.keep
            x = x[:, sta_reference.drop(x[0].tolist(), keys.tolist(), stage.groups, r, reverse)]
    return model.head(model.fc_norm(x.mean(1)))


@pytest.mark.parametrize("options", [{}, {"sta.stages": "1,2,4", "sta.direction": "reverse,forward,reverse"}])
def test_whole_model(options):
    model = small(**{"sta.r": "5", **options}).double()
    frames = clips(2).double()
    with torch.no_grad():
        found = model(frames)
        for clip in range(2):
            want = literal(model, frames[16 * clip : 16 * clip + 16])
            assert torch.allclose(found[clip], want[0], atol=1e-10)


def test_stages_and_numbers_of_tokens_are_the_papers():
    for depth, blocks in ((12, [0, 4, 8]), (24, [0, 8, 16]), (32, [0, 10, 21])):
        stages = sta.plan_stages(StaSettings(r=64), (8, 14, 14), depth)
        assert [s.block for s in stages] == blocks
        assert [s.groups * s.keep for s in stages] == [1056, 800, 672]
        assert [s.direction for s in stages] == ["forward", "reverse", "forward"]


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-20])
def test_constant_frames_give_finite_logits(value):
    model = small(**{"sta.r": 5})
    with torch.no_grad():
        assert torch.isfinite(model(torch.full((16, 3, 64, 64), value))).all()


def test_zero_prunes_nothing():
    model, plain = small(**{"sta.r": 0}), small()
    with torch.no_grad():
        assert torch.equal(model(clips()), plain(clips()))
    assert not hasattr(model, "without_pruning")


def test_without_pruning_is_the_dense_model_on_the_same_weights():
    model, plain = small(**{"sta.r": 5}), small()
    twin = model.without_pruning()
    with torch.no_grad():
        assert torch.equal(twin(clips()), plain(clips()))
        assert not torch.equal(model(clips()), plain(clips()))
    pairs = zip(model.named_parameters(), twin.named_parameters(), strict=True)
    assert all(name == other and p is q for (name, p), (other, q) in pairs)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert twin.token_groups == []
    assert twin.without_pruning() is twin


def test_a_copy_prunes_by_itself():
    model = small(**{"sta.r": 5})
    other = copy.deepcopy(model)
    with torch.no_grad():
        want = model(clips())
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(other(clips()), want)


def test_random_drop_keeps_as_many_and_is_decided_by_the_seed():
    first, again, other = (small(**{"sta.r": 5, "sta.method": "random", "sta.seed": seed}) for seed in (0, 0, 1))
    pruned = small(**{"sta.r": 5})
    assert first.token_groups == pruned.token_groups
    with torch.no_grad():
        assert torch.equal(first(clips(2)), again(clips(2)))
        assert not torch.equal(first(clips()), other(clips()))
        assert not torch.equal(first(clips()), pruned(clips()))
        assert torch.allclose(first(clips(2))[:1], first(clips(1)), atol=1e-6)


class OtherAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = 2
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, states):
        weights = (self.query(states) @ self.key(states).transpose(1, 2) / 2).softmax(-1)
        return weights @ self.value(states)


class OtherBlock(nn.Module):
    def __init__(self, returns_tuple):
        super().__init__()
        self.attention, self.returns_tuple = OtherAttention(), returns_tuple

    def forward(self, x):
        x = x + self.attention(states=x)
        return (x, None) if self.returns_tuple else x


class Other(nn.Module):
    """Another library's transformer: other names, keys of their own with a bias, blocks that return tuples."""

    def __init__(self, returns_tuple=True):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(OtherBlock(returns_tuple) for _ in range(3))

    def forward(self, x):
        for block in self.encoder.layer:
            x = block(x)[0] if block.returns_tuple else block(x)
        return x


NAMES = {"blocks": "encoder.layer", "attention": "attention", "keys": "key"}


@pytest.mark.parametrize("returns_tuple", [False, True])
def test_a_transformer_of_anyones(returns_tuple):
    torch.manual_seed(0)
    model = Other(returns_tuple).double()
    x = torch.randn(2, 16, 8, dtype=torch.float64)
    dense = model(x)
    stages = sta.prune(model, grid=(4, 2, 2), settings=StaSettings(2, (2, 1), (0, 2), ("forward", "reverse")), **NAMES)
    found = model(x)
    assert [(s.tokens, s.keep) for s in stages] == [(8, 6), (12, 10)]
    assert torch.equal(model.without_pruning()(x), dense)
    for clip in range(2):
        y = x[clip : clip + 1]
        for number, block in enumerate(model.encoder.layer):
            read, y = y, y + block.attention(y)
            for stage in stages:
                if stage.block == number:
                    keys = block.attention.key(read).reshape(read.shape[1], 2, -1).mean(1)
                    reverse = stage.direction == "reverse"
                    y = y[:, sta_reference.drop(y[0].tolist(), keys.tolist(), stage.groups, 2, reverse)]
        assert torch.allclose(found[clip], y[0], atol=1e-10)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ({**NAMES, "blocks": "blocks"}, "looked for 'blocks', the list of blocks; found encoder"),
        ({**NAMES, "blocks": "encoder"}, "looked for 'encoder', a list of blocks; found a Module"),
        ({**NAMES, "attention": "attn"}, "looked for 'attn', the attention; found attention"),
        ({**NAMES, "keys": "qkv"}, "looked for 'qkv', the linear layer of the keys; found query, key, value"),
        ({**NAMES, "heads": 3}, "looked for keys of 3 heads; found 8 rows in 'key'"),
    ],
)
def test_a_transformer_that_is_not_recognised(names, why):
    with pytest.raises(UsageError, match="does not recognise") as error:
        sta.prune(Other(), grid=(8, 2, 2), settings=StaSettings(2), **names)
    assert error.value.why == why
    assert "prune(model, blocks=" in error.value.hint


def test_heads_that_nothing_tells():
    model = Other()
    for block in model.encoder.layer:
        del block.attention.heads
    with pytest.raises(UsageError, match="does not recognise") as error:
        sta.prune(model, grid=(8, 2, 2), settings=StaSettings(2), **NAMES)
    assert "num_heads" in error.value.why
    assert sta.prune(model, grid=(8, 2, 2), settings=StaSettings(2), heads=2, **NAMES)


def test_tokens_of_another_number_than_the_grid():
    model = Other()
    sta.prune(model, grid=(8, 2, 2), settings=StaSettings(2), **NAMES)
    with pytest.raises(UsageError, match=r"encoder.layer.0: it returns \(1, 33, 8\)") as error:
        model(torch.randn(1, 33, 8))
    assert "[clips, 32, channels]" in error.value.why


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        ({"sta.r": 9}, "sta.r=9 is too large: a group of pruning 0 has 16 tokens", "sta.r=8 or less"),
        ({"sta.r": -1}, "sta.r=-1 is out of range", "0 prunes nothing"),
        ({"frames": 8}, "a clip of 4 frames of tokens can't be joined to 8 groups", "the first divides 4"),
        ({"sta.groups": "8,3,1"}, "8 groups can't be joined to 3 groups", "each number divides the one before"),
        ({"sta.groups": "8,4"}, "3 stages, 2 groups and 3 directions", "equally many"),
        ({"sta.stages": "0,2,6"}, "can't prune after blocks 0, 2, 6", "ascending"),
        ({"sta.stages": "2,0,4"}, "can't prune after blocks 2, 0, 4", "ascending"),
        ({"depth": 2}, "can't prune after blocks 0, 0, 1", "each block once"),
        ({"sta.direction": "forward,revers,forward"}, "unknown direction of STA 'revers'", "reverse"),
        ({"sta.method": "randon"}, "unknown value of sta_method 'randon'", "random"),
        ({"sta.rr": 1}, "unknown option 'sta.rr'", "sta_r"),
        ({"sta.r": "many"}, "can't be 'many'", "int"),
    ],
)
def test_options_that_do_not_fit(options, what, hint):
    with pytest.raises(UsageError) as error:
        small(**{"sta.r": 2, **options})
    assert what in error.value.what
    assert hint in f"{error.value.hint} {error.value.why}"


def test_the_smallest_group_that_r_fits():
    stages = sta.plan_stages(StaSettings(r=8), (8, 4, 4), 6)
    assert [s.tokens for s in stages] == [16, 16, 16]
    assert math.prod((8, 4, 4)) == stages[0].groups * stages[0].tokens
