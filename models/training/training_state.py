"""What a training leaves on disk: the state it resumes from, its curves, and the trained weights.

Each file is written whole or not at all, so that a kill or a full disk leaves the file of the epoch
before.
"""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dvexport.errors import CheckpointError, UsageError
from dvexport.files import atomic_write
from dvexport.models import zoo
from dvexport.models.training.recipe import recipe_names

__all__ = ["Files", "TrainingState", "find_weights", "half_precision_weights", "load_state", "save_state"]


@dataclass(frozen=True)
class Files:
    """The files of the training called `name` in `folder`."""

    folder: Path
    name: str

    @property
    def state(self) -> Path:
        """What the training resumes from."""
        return self.folder / f"{self.name}.state.pt"

    @property
    def curves(self) -> Path:
        """One JSON object a line and epoch."""
        return self.folder / f"{self.name}.jsonl"

    @property
    def weights(self) -> Path:
        """The trained model."""
        return self.folder / f"{self.name}.safetensors"


@dataclass
class TrainingState:
    """All that the epochs done so far have changed.

    No random state is kept: each epoch seeds its own from the recipe's seed and its number.

    Attributes:
        recipe: digest of the recipe.
        epoch: epochs done.
        model, optimiser: their `state_dict`.
        curves: one record an epoch.
    """

    recipe: str
    epoch: int
    model: dict[str, Any]
    optimiser: dict[str, Any]
    curves: list[dict[str, Any]] = field(default_factory=list)


def save_state(files: Files, state: TrainingState) -> None:
    """Write the state and the curves of a training; UsageError if the disk refuses."""
    # Through memory: torch reports a full disk as an error of its own, not as the system's.
    buffer = io.BytesIO()
    torch.save(vars(state), buffer)
    with atomic_write(files.state) as path:
        path.write_bytes(buffer.getvalue())
    with atomic_write(files.curves) as path:
        path.write_text("".join(json.dumps(record) + "\n" for record in state.curves), encoding="utf-8")


def load_state(files: Files, recipe: str) -> TrainingState | None:
    """Return the state that a training left, None if it left none.

    Raises:
        CheckpointError: the file is damaged.
        UsageError: it was left by another recipe.
    """
    if not files.state.exists():
        return None
    try:
        state = TrainingState(**torch.load(files.state, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, EOFError, TypeError, ValueError, pickle.UnpicklingError):
        raise CheckpointError(
            "the training's state can't be read",
            where=str(files.state),
            why="the file is damaged",
            hint="delete it to begin again",
        ) from None
    if state.recipe != recipe:
        raise UsageError(
            "the training in this folder was begun with another recipe",
            where=str(files.state),
            hint="choose another output folder, or begin again without resuming",
        )
    return state


def find_weights(name: str, folder: Path) -> Path:
    """Return the file that a recipe's `start_from` means.

    Args:
        name: a file; else a training that left its weights in `folder`; else a model that ships.
        folder: output folder of the training that starts.

    Raises:
        UsageError: none of the three.
    """
    places = [Path(name), Files(folder, name).weights, zoo.weights_folder() / f"{name}.safetensors"]
    for place in places:
        if place.is_file():
            return place
    first = f"first `dvexport train {name} -o {folder}`" if name in recipe_names() else "a safetensors file"
    raise UsageError(f"no weights '{name}' to start from", where=str(folder), hint=first)


def half_precision_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensors on the CPU, weights of two or more axes in half precision.

    They hold nearly all the bytes. Biases and batch norm statistics stay in single precision.
    Layers that several blocks share are there once, under their first name.
    """
    live = model.state_dict(keep_vars=True)
    first_names = {id(tensor): name for name, tensor in reversed(live.items())}
    tensors = {name: live[name].detach().cpu().contiguous() for name in sorted(first_names.values())}
    return {
        name: tensor.half() if tensor.is_floating_point() and tensor.ndim >= 2 else tensor
        for name, tensor in tensors.items()
    }
