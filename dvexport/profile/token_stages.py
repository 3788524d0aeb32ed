"""Where a video transformer dropped tokens, from a bundle's manifest and one clip's decisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dvexport.profile.result import TokenStage
from dvexport.tokens import survivors

if TYPE_CHECKING:
    from dvexport.bundle.manifest import Manifest

__all__ = ["token_stages"]


def token_stages(manifest: Manifest, decisions: Mapping[tuple[str, str], np.ndarray]) -> list[TokenStage]:
    """Return every stage, with the survivors where the model tells where its tokens lie; none without tokens.

    Args:
        decisions: those of the profiled clip.
    """
    counts = {gate.name: gate.tokens for gate in manifest.gates if gate.tokens is not None}
    if manifest.tokens is None:
        return [TokenStage(name, 1, tokens, keep) for name, (keep, tokens) in counts.items()]
    left = survivors(manifest.tokens.grid, manifest.tokens.stages, decisions, manifest.tokens.grids)
    stages = []
    for gates, mask in zip(manifest.tokens.stages, left, strict=True):
        keep, tokens = counts[gates[0]]
        name = gates[0].rpartition(".")[0] or gates[0]
        stages.append(TokenStage(name, len(gates), tokens, keep, mask.astype(int).tolist()))
    return stages
