"""Gates whose decisions are mixed, without training."""

from __future__ import annotations

import torch
from torch import nn

from dvexport.models.networks.policies import ChannelPolicy, TileMask


def randomize_gates(model: nn.Module, seed: int = 0) -> None:
    """Give the policies and masks of `model` weights whose decisions are mixed and depend on the input.

    The official initialisation, N(0, 0.001) without bias, decides by near ties. Tests
    use this where no trained weights are.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ChannelPolicy):
                _spread_linear(module.fc0, 1.0, generator)
                _spread_linear(module.fc1, 1.0, generator)
            elif isinstance(module, TileMask):
                weight = torch.randn(module.conv.weight.shape, generator=generator)
                # Zero-mean per filter: the logit then reads differences between tiles, not brightness.
                module.conv.weight.copy_(weight - weight.mean())
                module.conv.bias.zero_()  # type: ignore[union-attr]


def _spread_linear(layer: nn.Linear, scale: float, generator: torch.Generator) -> None:
    weight = torch.randn(layer.weight.shape, generator=generator) * scale / layer.in_features**0.5
    layer.weight.copy_(weight)
    layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) * 0.1)
