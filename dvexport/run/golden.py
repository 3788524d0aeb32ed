"""The clip and the results that travel in a bundle, so that it can be verified without the model.

The frames are those of a sample clip that ships for one of the model's labels, or else a moving noise
texture. The results are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dvexport.decisions import ACTION, TILES, TOKENS, probe_name
from dvexport.run.forced import ForcedRun
from dvexport.run.forced import pack as forced_arrays
from dvexport.run.session import Decisions, Step
from dvexport.video.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn

__all__ = ["moving_texture", "pack", "sample_clip", "torch_forced", "torch_steps", "unpack"]

_CELLS = 24
"""Cells of the noise texture along the short side: coarse enough to survive a strided stem."""


def sample_clip(labels: Sequence[str]) -> Path | None:
    """Return the shipped clip of the first label that has one."""
    folder = Path(str(resources.files("dvexport.models"))) / "clips"
    paths = (folder / f"{label}.mp4" for label in labels if label and "/" not in label)
    return next((path for path in paths if path.is_file()), None)


def moving_texture(preprocess: Preprocess, frames: int, seed: int = 0) -> np.ndarray:
    """Return normalised float32 `[frames, 3, H, W]`: one noise texture, moving a few pixels a frame."""
    height, width = preprocess.size
    cell = max(1, min(height, width) // _CELLS)
    rng = np.random.default_rng(seed)
    coarse = rng.random((3, -(-height // cell), -(-width // cell)), dtype=np.float32)
    image = coarse.repeat(cell, 1).repeat(cell, 2)[:, :height, :width]
    step = max(1, width // 40)
    clip = np.stack([np.roll(image, (i * step // 2, i * step), (1, 2)) for i in range(frames)])
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (preprocess.mean, preprocess.std))
    return (clip - mean) / std


def torch_steps(model: nn.Module, frames: np.ndarray, follow: Sequence[Step] = ()) -> list[Step]:
    """Run the PyTorch model on a clip, eager and in evaluation mode.

    Args:
        frames: float32 `[T, 3, H, W]`, normalised.
        follow: another run, whose tokens are taken in the place of the model's own (`gates.token_decisions`).

    Returns:
        One step a frame, or one for a model that reads the clip as one; with the tokens chosen, and the
        decisions of models that tell them (`model.decisions()`).
    """
    import torch

    from dvexport import gates

    given = follow[0].decisions.items() if follow else ()
    taken = {gate: torch.from_numpy(value)[None] for (gate, kind), value in given if kind == TOKENS.name}
    with torch.no_grad(), gates.token_decisions(taken) as tokens:
        logits = model.eval()(torch.from_numpy(frames)).numpy()
    decided = [_decision_arrays(d) for d in model.decisions()] if hasattr(model, "decisions") else []  # type: ignore[operator]
    merged = {key: value for arrays in decided for key, value in arrays.items()}
    merged |= {(gate, TOKENS.name): index.numpy() for gate, index in tokens.items()}
    return [Step(logits[i], {key: value[i] for key, value in merged.items()}) for i in range(len(logits))]


def _decision_arrays(decision) -> dict[tuple[str, str], np.ndarray]:
    found = {}
    if decision.action is not None:
        found[decision.gate, ACTION.name] = decision.action.numpy().astype(np.int64)
    if decision.tiles is not None:
        found[decision.gate, TILES.name] = decision.tiles.numpy() != 0
    return found


def torch_forced(
    model: nn.Module, frames: np.ndarray, decisions: Sequence[Decisions]
) -> tuple[list[Step], frozenset[tuple[str, str]]]:
    """Run the PyTorch model on a clip under the decisions of each frame.

    Returns:
        One step a frame, and the decisions that it may not have followed everywhere (`forced_eager.forced_logits`).
    """
    import torch

    from dvexport.run.forced_eager import forced_logits

    given = {key: torch.from_numpy(np.stack([one[key] for one in decisions])) for key in decisions[0]}
    logits, unseen = forced_logits(model, torch.from_numpy(frames), given)
    return [Step(row, dict(one)) for row, one in zip(logits.numpy(), decisions, strict=True)], unseen


def pack(frames: np.ndarray, steps: Sequence[Step], runs: Sequence[ForcedRun] = ()) -> bytes:
    """Return the golden data as safetensors: `frames`, `logits`, `probe.GATE.KIND`, and those of forced runs."""
    from safetensors.numpy import save

    arrays = {"frames": frames, "logits": np.stack([step.logits for step in steps]), **forced_arrays(runs)}
    for gate, kind in steps[0].decisions:
        arrays[probe_name(gate, kind)] = np.stack([step.decisions[gate, kind] for step in steps])
    return save({name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())})


def unpack(golden: Mapping[str, np.ndarray]) -> tuple[np.ndarray, list[Step]]:
    """Return the frames and steps that `pack` stored."""
    from dvexport.run.session import steps_of

    return golden["frames"], steps_of(golden, 0.0)
