"""Small models, and bundles of them made once for all tests of a process."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from dvexport.bundle.archive import Bundle
from dvexport.export import export
from dvexport.models import zoo
from dvexport.models.base import VideoModel
from dvexport.models.networks.policies import randomize_gates

FRAMES, SIZE = 5, 64


@functools.cache
def small_model(name: str) -> VideoModel:
    """A model of the zoo at a quarter of its width, with gates that decide by its input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = zoo.create(name, width=0.25, size=(SIZE, SIZE), classes=12, frames=FRAMES)
        # The official initialisation of the classifier gives logits near zero, where any error hides.
        torch.nn.init.normal_(model.fc.weight)
    randomize_gates(model)
    return model.eval()


@functools.cache
def small_bundle(name: str, mode: str) -> Bundle:
    """A bundle of `small_model`."""
    return export(small_model(name), output=_folder() / f"{name}.{mode}.dvx", mode=mode)


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dvexport-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def noise(frames: int = FRAMES, seed: int = 0) -> np.ndarray:
    """Random frames `[T, 3, H, W]`."""
    return np.random.default_rng(seed).standard_normal((frames, 3, SIZE, SIZE)).astype(np.float32)


def logits(steps) -> np.ndarray:
    """The logits of steps `[T, classes]`."""
    return np.stack([step.logits for step in steps])


def torch_logits(model: VideoModel, frames: np.ndarray) -> np.ndarray:
    """PyTorch's logits `[T, classes]`."""
    with torch.no_grad():
        return model(torch.from_numpy(frames)).numpy()
