"""Eager gates: what the functions compute, and that gradients reach the decisions in training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dvexport import gates

FRAMES, CIN, COUT = 6, 3, 4


def layer():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(CIN, COUT, 3, padding=1), nn.BatchNorm2d(COUT).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.normal_()
    return conv, norm


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_gated_conv_by_definition(activation):
    conv, norm = layer()
    x, action = torch.randn(FRAMES, CIN, 7, 9), torch.randint(0, 3, (FRAMES, COUT))
    tiles = torch.rand(FRAMES, 3, 2) < 0.5
    v = norm(conv(x))
    v = torch.relu(v) if activation == "relu" else v
    expected = torch.zeros_like(v)
    for n, c, y, z in np.ndindex(*v.shape):
        if tiles[n, y * 3 // 7, z * 2 // 9]:
            history = v[n - 1, c, y, z] if n else torch.tensor(0.0)
            expected[n, c, y, z] = (torch.tensor(0.0), history, v[n, c, y, z])[action[n, c]]
    found = gates.gated_conv(x, conv, norm, gate="g", activation=activation, action=action, tiles=tiles)
    torch.testing.assert_close(found, expected)
    one_hot = nn.functional.one_hot(action, 3).float()
    again = gates.gated_conv(x, conv, norm, gate="g", activation=activation, action=one_hot, tiles=tiles.float())
    torch.testing.assert_close(again, expected)


def test_gradients_reach_relaxed_decisions():
    conv, norm = layer()
    action = torch.rand(FRAMES, COUT, 3, requires_grad=True)
    tiles = torch.rand(FRAMES, 3, 2, requires_grad=True)
    gates.gated_conv(torch.randn(FRAMES, CIN, 7, 9), conv, norm, gate="g", action=action, tiles=tiles).sum().backward()
    assert action.grad[..., gates.SKIP].abs().max() == 0
    assert action.grad[0, :, gates.REUSE].abs().max() == 0  # nothing before the first frame
    assert action.grad[1:, :, gates.REUSE].abs().min() > 0
    assert action.grad[..., gates.COMPUTE].abs().min() > 0
    assert tiles.grad.abs().min() > 0


def test_delay_and_mean_stay_inside_clips():
    x = torch.randn(FRAMES, 2)
    for function in (gates.delay, gates.frame_mean):
        with gates.frames_per_clip(3):
            batched = function(x, name="n")
        apart = torch.cat([function(clip, name="n") for clip in x.split(3)])
        torch.testing.assert_close(batched, apart)
    torch.testing.assert_close(gates.frame_mean(x, name="n")[-1], x.mean(0))
    torch.testing.assert_close(gates.delay(x, name="n"), torch.cat([torch.zeros(1, 2), x[:-1]]))


def test_clip_length_is_restored():
    x = torch.randn(FRAMES, 2)
    with pytest.raises(ZeroDivisionError), gates.frames_per_clip(2):
        _ = 1 / 0
    torch.testing.assert_close(gates.delay(x, name="n")[2], x[1])


@pytest.mark.parametrize(("size", "grid"), [((7, 9), (3, 2)), ((8, 8), (4, 4)), ((5, 6), (5, 4))])
def test_upsample_tiles(size, grid):
    tiles = torch.randn(2, *grid)
    found = gates.upsample_tiles(tiles, size)
    assert found.shape == (2, 1, *size)
    for y, x in np.ndindex(*size):
        assert (found[:, 0, y, x] == tiles[:, y * grid[0] // size[0], x * grid[1] // size[1]]).all()


@pytest.mark.parametrize("bias", [False, True])
def test_fold_batch_norm(bias):
    _, norm = layer()
    conv = nn.Conv2d(CIN, COUT, 3, bias=bias)
    x = torch.randn(2, CIN, 5, 5)
    weight, folded = gates.fold_batch_norm(conv, norm)
    torch.testing.assert_close(nn.functional.conv2d(x, weight, folded), norm(conv(x)))
    assert gates.fold_batch_norm(conv, None) == (conv.weight, conv.bias)


def test_select_tokens_by_definition():
    torch.manual_seed(0)
    x, score = torch.randn(2, 7, 5), torch.tensor([[2.0, 0, 1, 0, 2, 1, 0], [0, 0, 0, 0, 0, 0, 0]])
    kept, index = gates.select_tokens(x, score, 4, gate="sta.0.0")
    assert index.tolist() == [[1, 3, 6, 2], [0, 1, 2, 3]]
    for b in range(2):
        assert torch.equal(kept[b], x[b, index[b]])


def test_select_tokens_exports_as_its_operator():
    class Half(nn.Module):
        def forward(self, x):
            kept, index = gates.select_tokens(x, x.sum(2), 3, gate="half")
            return kept, index

    program = torch.onnx.export(Half().eval(), (torch.zeros(1, 6, 4),), dynamo=True, opset_version=20, verbose=False)
    (node,) = (node for node in program.model.graph if node.domain == "dv")
    assert node.op_type == "SelectTokens"
    assert node.attributes["keep"].as_int() == 3 and node.attributes["gate"].as_string() == "half"
    assert [list(output.shape) for output in node.outputs] == [[1, 3, 4], [1, 3]]
