"""The losses of the papers by hand, and decisions with and without noise."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from random_gates import randomize_gates

from dvexport import gates
from dvexport.models import zoo
from dvexport.models.networks.policies import ChannelPolicy, Decision, TileMask, executed_macs
from dvexport.models.training import losses

SKIP, REUSE, COMPUTE = 0, 1, 2


def decision(actions, tiles):
    """Two convolutions of a block over 2 x 2 tiles of 4 x 4 pixels: 1000 MACs, then 600."""
    hot = torch.nn.functional.one_hot(torch.tensor(actions), 3).float().requires_grad_()
    mask = torch.tensor(tiles, dtype=torch.float32).requires_grad_()
    return Decision("layer1.0", hot, mask, ((4, 4), (4, 4)), (1000, 600))


def test_executed_fraction_counts_the_reuse_of_the_next_frame():
    """Equation 2 by hand, one clip of two frames, two channels, all tiles on."""
    ones = [[[1, 1], [1, 1]]] * 2
    block = decision([[COMPUTE, SKIP], [SKIP, REUSE]], ones)
    # Frame 0: channel 0 computed here, channel 1 for frame 1: all of conv1; conv2 reads one of two.
    # Frame 1: nothing of conv1; conv2 reads channel 1.
    assert executed_macs(block).tolist() == [1000 + 300, 0 + 300]
    fraction = losses.executed_fraction([block])
    assert fraction.item() == pytest.approx((1300 + 300) / 2 / 1600)
    assert losses.sparsity_loss(fraction, 0.6).item() == pytest.approx((0.5 - 0.6) ** 2, abs=1e-7)


def test_executed_fraction_counts_active_tiles_and_passes_gradients():
    block = decision([[COMPUTE, COMPUTE]], [[[1, 0], [0, 0]]])
    fraction = losses.executed_fraction([block])
    assert fraction.item() == pytest.approx(0.25)
    losses.sparsity_loss(fraction, 0.1).backward()
    assert block.tiles.grad.abs().sum() > 0
    assert block.action.grad.abs().sum() > 0


def test_reuse_never_reaches_into_the_clip_before():
    ones = [[[1, 1], [1, 1]]] * 2
    block = decision([[SKIP, SKIP], [REUSE, REUSE]], ones)
    with gates.frames_per_clip(1):
        assert executed_macs(block).tolist() == [0, 600]
    assert executed_macs(block).tolist() == [1000, 600]


def test_sparsity_weight_is_zero_then_grows():
    schedule = {"warmup": 3, "alpha": 2.0, "beta": 0.1}
    assert losses.sparsity_weight(2.9, **schedule) == 0
    assert losses.sparsity_weight(3, **schedule) == pytest.approx(2 * math.exp(0.3))
    assert losses.sparsity_weight(10, **schedule) == pytest.approx(2 * math.e)


def test_mask_bounds_relax_from_tight_to_loose():
    assert losses.mask_bounds(0, density=0.7, floor=0.2, ceiling=0.9) == pytest.approx((0.7, 0.7))
    assert losses.mask_bounds(0.5, density=0.7, floor=0.2, ceiling=0.9) == pytest.approx((0.45, 0.8))
    assert losses.mask_bounds(1, density=0.7, floor=0.2, ceiling=0.9) == pytest.approx((0.2, 0.9))
    assert losses.mask_bounds(7, density=0.7) == pytest.approx((0, 1))


def test_bound_loss_is_the_squared_distance_to_the_bounds():
    quarter = decision([[COMPUTE, SKIP]], [[[1, 0], [0, 0]]])
    full = decision([[COMPUTE, SKIP]], [[[1, 1], [1, 1]]])
    found = losses.bound_loss([quarter, full], (0.4, 0.8))
    assert found.item() == pytest.approx((0.15**2 + 0.2**2) / 2)
    assert losses.bound_loss([quarter, full], (0.25, 1.0)).item() == 0
    assert losses.bound_loss([dataclasses.replace(full, tiles=None)], (0.4, 0.8)).item() == 0


def test_without_noise_training_decides_as_evaluation():
    model = zoo.create("dstep_paper_resnet18", width=0.125, size=32, classes=12, frames=4)
    randomize_gates(model)
    policy, mask = model.layer2[0].gates.policy, model.layer2[0].gates.mask
    assert isinstance(policy, ChannelPolicy)
    assert isinstance(mask, TileMask)
    x = torch.randn(8, mask.conv.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    evaluated = policy(x), mask(x, (8, 8))
    policy.noise_scale = mask.noise_scale = 0.0
    policy.training = mask.training = True  # the batch norm within stays in evaluation mode
    trained = policy(x), mask(x, (8, 8))
    assert torch.equal(trained[0].argmax(2), evaluated[0])
    assert torch.equal(trained[1] > 0.5, evaluated[1])
    assert 0 < evaluated[1].float().mean() < 1
