"""Decisions at chosen rates, as inputs of a forced model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dvexport.decisions import FORCED, decision_key, forced_name
from dvexport.graph.graph import static_shape
from dvexport.profile.measure import random_decisions

__all__ = ["decisions", "group_decisions"]


def decisions(model: ir.Model, *, tiles: float = 1.0, channels: float = 1.0) -> dict[str, np.ndarray]:
    """Return one frame's forced inputs: `tiles` of the cells active, `channels` computed, the rest skipped."""
    (drawn,) = random_decisions(_shapes(model), {"tiles": tiles, "channels": channels}, frames=1)
    return {forced_name(*key): value[None] for key, value in drawn.items()}


def group_decisions(model: ir.Model, groups: int, rate: float) -> dict[str, np.ndarray]:
    """Return forced inputs that compute whole ranges of channels, `rate` of `groups`, in every tile."""
    shapes = {key: (groups,) if key[1] == "action" else shape for key, shape in _shapes(model).items()}
    (drawn,) = random_decisions(shapes, {"channels": rate}, frames=1)
    wide = {key: shape[-1] // groups for key, shape in _shapes(model).items() if key[1] == "action"}
    return {forced_name(*key): np.repeat(value, wide.get(key, 1), axis=0)[None] for key, value in drawn.items()}


def _shapes(model: ir.Model) -> dict[tuple[str, str], tuple[int, ...]]:
    """Shapes of one frame's decisions by (gate, kind)."""
    found = {}
    for value in model.graph.inputs:
        name = value.name or ""
        if key := decision_key(name, FORCED):
            gate, kind = key
            found[gate, kind] = static_shape(value)[1:]
    return found
