"""The clip and the results that travel in a bundle, so that it can be verified without the model.

The frames are those of a sample clip that ships for one of the model's labels, or else a moving noise
texture. The results are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dvexport.decisions import ACTION, PROBE, TILES, TOKENS, decision_key, probe_name
from dvexport.ports import LOGITS, VIDEO, input_shapes, named_outputs, outputs_of
from dvexport.run.feeds import Feeds, Given, at, by_name, count
from dvexport.run.forced import ForcedRun
from dvexport.run.forced import pack as forced_arrays
from dvexport.run.session import Decisions, Step, stacked_outputs, steps_of
from dvexport.video.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["golden_feeds", "moving_texture", "pack", "sample_clip", "torch_forced", "torch_steps", "unpack"]

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


def golden_feeds(model: Any, video: np.ndarray) -> Feeds:
    """Return every input of a model: the video, and noise for the others, the same every time."""
    names, rng = input_shapes(model), np.random.default_rng(1)
    first = next(iter(names))
    return {
        name: video if name == first else rng.standard_normal((len(video), *shape), dtype=np.float32)
        for name, shape in names.items()
    }


def torch_steps(model: nn.Module, frames: Given, follow: Sequence[Step] = ()) -> list[Step]:
    """Run the PyTorch model on a clip, eager and in evaluation mode.

    Args:
        frames: float32 `[T, 3, H, W]`, normalised; or every input in the order of forward.
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
        result = model.eval()(*_tensors(frames))
    outputs = _arrays(model, result)
    decided = [_decision_arrays(d) for d in model.decisions()] if hasattr(model, "decisions") else []  # type: ignore[operator]
    merged = {key: value for arrays in decided for key, value in arrays.items()}
    merged |= {(gate, TOKENS.name): index.numpy() for gate, index in tokens.items()}
    return [Step(at(outputs, i), {key: value[i] for key, value in merged.items()}) for i in range(count(outputs))]


def _tensors(frames: Given) -> list[Tensor]:
    import torch

    return [torch.from_numpy(array) for array in by_name(frames).values()]


def _arrays(model: nn.Module, result: Any) -> dict[str, np.ndarray]:
    names = [output.name for output in outputs_of(model)]
    found = {name: value.numpy() for name, value in named_outputs(result, names).items()}
    return {name: found[name] for name in names if name in found}


def _decision_arrays(decision) -> dict[tuple[str, str], np.ndarray]:
    found = {}
    if decision.action is not None:
        found[decision.gate, ACTION.name] = decision.action.numpy().astype(np.int64)
    if decision.tiles is not None:
        found[decision.gate, TILES.name] = decision.tiles.numpy() != 0
    return found


def torch_forced(
    model: nn.Module, frames: Given, decisions: Sequence[Decisions]
) -> tuple[list[Step], frozenset[tuple[str, str]]]:
    """Run the PyTorch model on a clip under the decisions of each frame.

    Returns:
        One step a frame, and the decisions that it may not have followed everywhere (`forced_eager.forced_outputs`).
    """
    import torch

    from dvexport.run.forced_eager import forced_outputs

    given = {key: torch.from_numpy(np.stack([one[key] for one in decisions])) for key in decisions[0]}
    result, unseen = forced_outputs(model, _tensors(frames), given)
    outputs = _arrays(model, result)
    return [Step(at(outputs, i), dict(one)) for i, one in enumerate(decisions)], unseen


def pack(frames: Given, steps: Sequence[Step], runs: Sequence[ForcedRun] = ()) -> bytes:
    """Return the golden data as safetensors: inputs, outputs, `probe.GATE.KIND`, and those of forced runs."""
    from safetensors.numpy import save

    arrays = {**by_name(frames), **stacked_outputs(steps), **forced_arrays(runs)}
    for gate, kind in steps[0].decisions:
        arrays[probe_name(gate, kind)] = np.stack([step.decisions[gate, kind] for step in steps])
    return save({name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())})


def unpack(
    golden: Mapping[str, np.ndarray], inputs: Sequence[str] = (VIDEO,), outputs: Sequence[str] = (LOGITS,)
) -> tuple[Feeds, list[Step]]:
    """Return the inputs and steps that `pack` stored; KeyError if there is not all that is named."""
    probes = {name: array for name, array in golden.items() if decision_key(name, PROBE)}
    steps = steps_of({**{name: golden[name] for name in outputs}, **probes}, 0.0)
    return {name: golden[name] for name in inputs}, steps
