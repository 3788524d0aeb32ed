"""Gated ResNets against their equations, and what they export."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models_reference import randomize_norms, resnet
from random_gates import randomize_gates

from dvexport import gates
from dvexport.errors import TraceError
from dvexport.models import zoo
from dvexport.models.config import ResNetConfig
from dvexport.models.networks.policies import Decision, TileMask, executed_macs, pool_to_grid
from dvexport.models.networks.resnet import ResNet

SMALL = {"width": 0.125, "classes": 5, "size": (64, 64), "dropout": 0.0}


def lively(name, seed=0, **settings):
    torch.manual_seed(seed)
    model = zoo.create(name, **{**SMALL, "hidden": 16, "hidden_quota": 0, **settings})
    randomize_gates(model, seed)
    randomize_norms(model, seed)
    return model


def clip(frames=4, size=(64, 64), seed=1):
    return torch.randn(frames, 3, *size, generator=torch.Generator().manual_seed(seed))


CASES = {
    "adafuse": ("adafuse_resnet18", {}),
    "adafuse-r50": ("adafuse_resnet50", {}),
    "adafuse-last": ("adafuse_resnet50_last", {}),
    "no-history": ("adafuse_resnet18", {"history": False}),
    "no-skipping": ("adafuse_resnet18", {"skipping": False}),
    "no-bn-no-relu": ("adafuse_resnet18", {"gate_bn": False, "gate_relu": False}),
    "max-pooled-policy": ("dstep_resnet18", {"gate_pool": "max"}),
    "shifted": ("adafuse_resnet18", {"shift": "bidirectional"}),
    "shifted-online": ("dstep_resnet18", {"shift": "online", "shift_div": 4}),
    "dstep": ("dstep_resnet18", {}),
    "dstep-r50": ("dstep_resnet50", {"enabled_stages": (1, 2)}),
    "dstep-paper": ("dstep_paper_resnet18", {}),
    "dstep-shifted": ("dstep_resnet50", {"shift": "bidirectional"}),
    "tiles-only": ("dstep_resnet18", {"channel_gates": False}),
    "tsn": ("tsn_resnet18", {}),
    "tsm-in-place": ("tsm_resnet50", {"shift_place": "in_place"}),
    "tsm": ("tsm_resnet18", {}),
    "tsm-online": ("tsm_online_resnet50", {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(64, 64), (72, 104)], ids=["divides", "uneven"])
def test_equals_the_equations(case, size):
    name, settings = CASES[case]
    model = lively(name, size=size, **settings)
    frames = clip(size=size)
    with torch.no_grad():
        expected = resnet(model.state_dict(), frames, model.config)
        logits = model.per_frame_logits(frames)
        consensus = model(frames)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    means = torch.stack([expected[: t + 1].mean(0) for t in range(len(frames))])
    torch.testing.assert_close(consensus, means, rtol=1e-4, atol=1e-5)


def test_random_gates_decide_variously():
    model = lively("dstep_resnet18")
    with torch.no_grad():
        model(clip())
    decisions = model.decisions()
    assert [d.gate for d in decisions] == [f"layer{s}.{b}" for s in (1, 2, 3, 4) for b in (0, 1)]
    counts = sum(d.action.flatten().bincount(minlength=3) for d in decisions)
    assert (counts > 0.1 * counts.sum()).all()
    density = torch.cat([d.tiles.flatten() for d in decisions]).float().mean()
    assert 0.1 < density < 0.9
    varying = [d for d in decisions if (d.action[1:] != d.action[:-1]).any()]
    assert len(varying) > 4


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [({"history": False}, {0, 2}), ({"skipping": False}, {1, 2}), ({}, {0, 1, 2})],
    ids=["no-history", "no-skipping", "all"],
)
def test_actions_of_each_option(settings, allowed):
    model = lively("adafuse_resnet18", **settings)
    with torch.no_grad():
        model(clip())
    found = {int(a) for d in model.decisions() for a in d.action.unique()}
    assert found == allowed
    model.train()
    with gates.frames_per_clip(4):
        model(clip())
    for decision in model.decisions():
        assert decision.action.shape[-1] == 3
        used = decision.action.detach().flatten(0, 1).sum(0).nonzero().flatten().tolist()
        assert set(used) <= allowed


@pytest.mark.parametrize("case", CASES)
def test_batch_of_clips_equals_clip_by_clip(case):
    name, settings = CASES[case]
    model = lively(name, **settings)
    clips = [clip(seed=s) for s in (1, 2, 3)]
    with torch.no_grad():
        single = torch.cat([model(c) for c in clips])
        with gates.frames_per_clip(4):
            together = model(torch.cat(clips))
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_causal_means_no_frame_depends_on_later_ones(case):
    name, settings = CASES[case]
    model = lively(name, **settings)
    frames = clip()
    with torch.no_grad():
        whole = model(frames)
        prefixes = torch.stack([model(frames[: t + 1])[-1] for t in range(len(frames))])
    same = torch.allclose(whole, prefixes, rtol=1e-4, atol=1e-5)
    assert same == model.causal


def test_training_reaches_every_weight_of_the_gates():
    model = lively("dstep_resnet18", shared_policies=False).train()
    with gates.frames_per_clip(4):
        loss = model(torch.cat([clip(), clip(seed=2)])).square().mean()
        loss = loss + sum(executed_macs(d).mean() / sum(d.macs) for d in model.decisions())
    loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_training_masks_conv1_in_the_paper_only():
    frames = clip()
    for name, masked in (("dstep_resnet18", False), ("dstep_paper_resnet18", True)):
        model = lively(name, channel_gates=False).train()
        seen = {}
        block = model.get_submodule("layer1.0")
        block.conv2.register_forward_hook(lambda m, args, out, seen=seen: seen.update(u=args[0].detach()))
        model(frames)
        inactive = gates.upsample_tiles(block.decision.tiles.detach(), seen["u"].shape[2:]) == 0
        assert inactive.any()
        outside = seen["u"][inactive.expand_as(seen["u"])]
        assert bool((outside == 0).all()) == masked


def test_official_sampling_is_gumbel_softmax_also_in_evaluation():
    model = lively("adafuse_resnet18", sampling="official")
    frames = clip()
    with torch.no_grad():
        torch.manual_seed(5)
        model(frames)
        first = model.get_submodule("layer1.0").decision.action
        policy = model.get_submodule("layer1.0").gates.policy
        x = model.maxpool(F.relu(model.bn1(model.conv1(frames))))
        torch.manual_seed(5)
        logits = torch.log(F.softmax(policy.logits(x), dim=2).clamp(min=1e-8))
        expected = F.gumbel_softmax(logits, tau=0.67, hard=True).argmax(2)
    assert torch.equal(first, expected)


def test_sampling_is_repeatable_by_seed():
    model = lively("adafuse_resnet18", sampling="official")
    frames, results = clip(), []
    for seed in (3, 3, 4):
        model.seed_sampling(seed)
        with torch.no_grad():
            results.append(model(frames))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_sampling_is_refused_by_the_exporter():
    model = lively("adafuse_resnet18", sampling="official")
    with pytest.raises(TraceError, match="sampling=argmax"), torch.no_grad():
        torch.export.export(model, (clip(),), strict=False)


def test_shared_policies_are_one_set_of_weights():
    model = lively("adafuse_resnet18")
    blocks = [model.get_submodule(f"layer1.{i}").gates.policy for i in (0, 1)]
    assert blocks[0].fc0 is blocks[1].fc0
    assert blocks[0].bn is not blocks[1].bn


def test_model_with_decisions_can_be_copied():
    model = lively("dstep_resnet18").train()
    model(clip())
    copied = copy.deepcopy(model)
    assert copied.decisions() == []
    assert len(model.decisions()) == 8


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (9, 13)])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (7, 7), (1, 1)])
def test_pooling_follows_the_adaptive_rule(size, grid):
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(pool_to_grid(x, grid), F.adaptive_avg_pool2d(x, grid))


def test_masks_are_7x7_in_every_stage_at_224():
    with torch.device("meta"):
        for depth in (18, 50):
            model = ResNet(ResNetConfig(depth=depth, tile_gates=True, channel_gates=True)).eval()
            model(torch.empty(1, 3, 224, 224))
            assert {tuple(d.tiles.shape[1:]) for d in model.decisions()} == {(7, 7)}


def brute_force_macs(decision, macs):
    """Count channel by channel and pixel by pixel."""
    n, channels = decision.action.shape
    first, second = [], []
    maps = [gates.upsample_tiles(decision.tiles, s)[:, 0] for s in decision.sizes]
    for t in range(n):
        count = used = 0
        for c in range(channels):
            need = maps[0][t] & bool(decision.action[t, c] == 2)
            if t + 1 < n and decision.action[t + 1, c] == 1:
                need = need | maps[0][t + 1]
            count += int(need.sum())
            used += int((maps[1][t] & bool(decision.action[t, c] != 0)).sum())
        first.append(macs[0] * count / (channels * maps[0][0].numel()))
        second.append(macs[1] * used / (channels * maps[1][0].numel()))
    return [a + b for a, b in zip(first, second, strict=True)]


def test_executed_macs_count_what_is_asked_for():
    generator = torch.Generator().manual_seed(0)
    action = torch.randint(0, 3, (4, 6), generator=generator)
    tiles = torch.rand(4, 3, 2, generator=generator) < 0.5
    decision = Decision("g", action, tiles, ((7, 5), (7, 5)), (1000, 3000))
    assert executed_macs(decision).tolist() == pytest.approx(brute_force_macs(decision, (1000, 3000)))
    everything = Decision("g", torch.full_like(action, 2), torch.ones_like(tiles), ((7, 5),) * 2, (1000, 3000))
    assert executed_macs(everything).tolist() == pytest.approx([4000] * 4)
    nothing = Decision("g", torch.zeros_like(action), tiles, ((7, 5),) * 2, (1000, 3000))
    assert executed_macs(nothing).tolist() == [0] * 4


def test_mask_trains_through_a_hard_decision():
    mask = TileMask(4, 2, 0.67).train()
    tiles = mask(torch.randn(3, 4, 8, 8), (8, 8))
    assert set(tiles.detach().unique().tolist()) <= {0.0, 1.0}
    tiles.sum().backward()
    assert mask.conv.weight.grad.abs().sum() > 0


def test_export_gives_the_gate_dialect():
    model = lively("dstep_resnet18")
    frames = {0: torch.export.Dim("frames", min=2)}
    with torch.no_grad():
        program = torch.onnx.export(model, (clip(),), dynamo=True, dynamic_shapes=(frames,), verbose=False)
    nodes = list(program.model.graph)
    ops = [node.op_type for node in nodes if node.domain == "dv"]
    assert (ops.count("GatedConv"), ops.count("Delay"), ops.count("FrameMean")) == (16, 8, 1)
    states = [node.attributes["name"].value for node in nodes if node.op_type == "Delay"]
    assert len(set(states)) == len(states)
    assert not [node for node in nodes if node.domain not in ("", "dv")]


def test_static_baseline_exports_plain_operators():
    model = lively("tsn_resnet18")
    with torch.no_grad():
        program = torch.onnx.export(model, (clip(),), dynamo=True, verbose=False)
    assert {node.op_type for node in program.model.graph if node.domain == "dv"} == {"FrameMean"}
