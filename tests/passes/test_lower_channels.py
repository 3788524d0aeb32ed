"""Channel lowering of a single convolution: weights are gathered inside a conditional."""

from __future__ import annotations

import pytest
from graphs import ops
from sparse import lowers

from dvexport.passes.lower_channels import LowerChannels

ARGUMENTS = [
    "rows",
    "rows, , , , base",
    "rows, tiles, , , base",
    "rows, tiles",
    ", , active_in",
    ", tiles, active_in, residual, base",
    ", , , residual",
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_agrees(arguments, activation):
    model = lowers(LowerChannels(), "channels", arguments, activation=activation)
    gated = "rows" in arguments or "active_in" in arguments
    assert ops(model).count("If") == gated
    assert ("Conv" in ops(model)) != gated
