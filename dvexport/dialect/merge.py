"""`dv.Merge(V, H?, action?, tiles?) -> U`: the merge of computed, reused and skipped channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from dvexport.decisions import Action
from dvexport.dialect.conv import plane_size
from dvexport.dialect.masks import channel_mask, share_of, upsample
from dvexport.dialect.spec import Operator
from dvexport.graph.graph import Builder

__all__ = ["Merge", "merge"]


def merge(
    build: Builder, v: ir.Value, history: ir.Value | None, action: ir.Value | None, tiles: ir.Value | None
) -> ir.Value:
    """Write `S * ([a=2] V + [a=1] H)` (D-STEP Eq. 1, same-frame mask as in its code)."""
    u = v
    if action is not None:
        kept = build.op("Mul", v, channel_mask(build, share_of(build, action, Action.COMPUTE)))
        u = build.op("Add", kept, build.op("Mul", history, channel_mask(build, share_of(build, action, Action.REUSE))))
    if tiles is not None:
        as_float = build.op("Cast", tiles, to=ir.DataType.FLOAT, shape=list(tiles.shape or []), dtype=ir.DataType.FLOAT)
        u = build.op("Mul", u, upsample(build, as_float, plane_size(v)))
    return u


class Merge(Operator):
    """`U = S * ([a=2] V + [a=1] H)`.

    V, H, U: `[N, C, H, W]`; action: int64 `[N, C]`; tiles: bool `[N, gh, gw]`.
    H may be V itself: `U = S * [a != 0] V`.
    """

    name = "Merge"
    inputs = ("V", "H?", "action?", "tiles?")
    outputs = ("U",)
    attributes: ClassVar[Mapping[str, Any]] = {"gate": None}

    def reference(
        self, build: Builder, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any]
    ) -> Sequence[ir.Value]:
        """A product for each action by channel, one by pixel."""
        v = inputs["V"]
        assert v is not None
        u = merge(build, v, inputs["H"], inputs["action"], inputs["tiles"])
        return [u if u is not v else build.op("Identity", v)]

    def problems(self, node: ir.Node) -> list[str]:
        """An action needs a history."""
        inputs = self.bind(node)
        found = super().problems(node)
        if inputs["action"] is not None and inputs["H"] is None:
            found.append("has an action but no history")
        return found
