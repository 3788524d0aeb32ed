"""How far an artifact may be from its model: numbers that a backend states, a bundle keeps and `verify` reads.

Lowerings compute the same sums in another order, and Winograd's F(4, 3) loses about 1e-5 of the largest value per
convolution; over some twenty of them that stays below 1e-4. The limit of an output leaves a factor of ten above it,
and still is far below what moves a probability by a per cent. A decision is a comparison, so one that hangs on the
last bit may fall either way: one in ten thousand is allowed, none at all below that many decisions. Tokens are
ordered by scores that lie close together, some closer than two programs round. Where both sides follow the same tokens,
no swap reaches later decisions, so some of the places may hold another token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Limits"]

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Limits(BaseModel):
    """Numeric limits; the defaults are those of float32.

    Attributes:
        output: largest error of an output that `outputs` does not name, as a share of the output's own spread
            (`dvexport.run.compare`).
        outputs: likewise, by name.
        decisions: share of the decisions that may differ, rounded down to whole decisions.
        tokens: share of the places in the order of tokens that may hold another token; at least two, which is one swap.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    output: Share = 1e-3
    outputs: dict[str, Share] = {}
    decisions: Share = 1e-4
    tokens: Share = 1e-2

    def naming(self, outputs: Sequence[str]) -> Limits:
        """Return the same limits with the one of every output said by its name, as a bundle keeps them."""
        return self.model_copy(update={"outputs": {name: self.of(name) for name in outputs}})

    def of(self, output: str) -> float:
        """Return the limit of an output."""
        return self.outputs.get(output, self.output)
