"""What a training leaves on disk: the state it resumes from, its curves, and the trained weights.

Each file is written under a temporary name and then renamed, so that a kill or a full disk leaves
the file of the epoch before.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dvexport.errors import CheckpointError, DeviceError, UsageError

__all__ = ["Files", "TrainingState", "half_precision_weights", "load_state", "save_state", "write_atomically"]


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


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all; DeviceError if the disk refuses."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DeviceError(
            f"'{path.name}' can't be written",
            where=str(path.parent),
            why=error.strerror or str(error),
            hint="free space or choose another folder; what was saved before is still there",
        ) from None


def save_state(files: Files, state: TrainingState) -> None:
    """Write the state and the curves of a training."""
    buffer = io.BytesIO()
    torch.save(vars(state), buffer)
    write_atomically(files.state, buffer.getvalue())
    lines = "".join(json.dumps(record) + "\n" for record in state.curves)
    write_atomically(files.curves, lines.encode())


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


def half_precision_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensors on the CPU, weights of two or more axes in half precision.

    They hold nearly all the bytes. Biases and batch norm statistics stay in single precision.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return {
        name: tensor.half() if tensor.is_floating_point() and tensor.ndim >= 2 else tensor
        for name, tensor in tensors.items()
    }
