"""What a model that prunes tokens offers is written down, and the models here offer it."""

from __future__ import annotations

from torch import nn

from dvexport.models import zoo
from dvexport.tokens import HasDenseForm, TellsTokens


def test_a_pruning_transformer_fits_the_protocols_and_a_plain_module_does_not():
    model = zoo.create("vit_small", embed_dim=48, heads=2, depth=12, frames=16, size=(64, 64), sta_r=2)
    assert isinstance(model, HasDenseForm)
    assert isinstance(model, TellsTokens)
    gates = [stage.gate(group) for stage in model.token_groups for group in range(stage.groups)]
    assert len(set(gates)) == len(gates) > 0
    assert not isinstance(nn.Identity(), HasDenseForm | TellsTokens)
