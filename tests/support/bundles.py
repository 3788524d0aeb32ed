"""Small models, and bundles of them made once for all tests of a run, whose processes share them."""

from __future__ import annotations

import fcntl
import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from onnx import numpy_helper
from random_gates import randomize_gates

from dvexport.bundle.archive import Bundle
from dvexport.bundle.graphs import read_graph
from dvexport.export import export
from dvexport.graph.weights import external_arrays
from dvexport.models import zoo
from dvexport.models.base import VideoModel

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


def shared(name: str, make: Callable[[Path], object]) -> Path:
    """A file for all processes of the run, made by the first that asks: `make(path)` writes it whole or not at all."""
    folder = Path(os.environ["DVEXPORT_TESTS"])
    path = folder / name
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait; it is let go when the file is closed
        if not path.exists():
            make(path)
    return path


@functools.cache
def small_bundle(name: str, mode: str) -> Bundle:
    """A bundle of `small_model`."""
    path = shared(f"{name}.{mode}.dvx", lambda path: export(small_model(name), backend="onnx", output=path, mode=mode))
    return Bundle.open(path)


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


def inlined(bundle: Bundle, name: str = "model.onnx") -> bytes:
    """Return a graph of a bundle that refers to no other file."""
    model = read_graph(bundle, name)
    arrays = external_arrays(model, bundle.array, where=name)
    for tensor in model.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
    return model.SerializeToString()
