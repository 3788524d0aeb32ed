"""Whole networks through the native backend: the small gated models of `oracle_check`, and models of the zoo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import onnx_ir as ir
import torch
from native_harness import host_machine
from oracle_check import FRAMES, traced
from torch import nn

from dvexport.export import build_model
from dvexport.models.base import VideoModel
from dvexport.passes.pipeline import Request
from dvexport.run.golden import moving_texture, sample_clip
from dvexport.run.session import Step, steps_of
from dvexport.targets import catalogue
from dvexport.targets.runtime import Runtime
from dvexport.targets.tvm.artifact import NativeArtifact, build_artifact
from dvexport.targets.tvm.machine.machine import Machine, machine_of
from dvexport.targets.tvm.passes import lower
from dvexport.trace import trace
from dvexport.video.clips import read_clip

__all__ = [
    "TOLERANCE",
    "artifact",
    "assert_same_steps",
    "machine_for",
    "own_steps",
    "rounding_error",
    "run_forced",
    "variants",
    "zoo_network",
]

TOLERANCE = 1e-5
"""Largest difference, as a share of the largest value."""

_NAMES = ("gated", "dense", "forced")


def machine_for(target: str) -> Machine:
    """The machine of a catalogue entry; of this one for `host`."""
    return host_machine() if target == catalogue.HOST else machine_of(catalogue.load(target).cpu)


def variants(model: ir.Model, mode: str, frames: int, names: tuple[str, ...] = _NAMES) -> dict[str, ir.Model]:
    """A traced model lowered for kernels, by variant."""
    plan = Request(mode=mode, frames=frames)
    plans = {"gated": plan, "dense": replace(plan, variant="dense"), "forced": replace(plan, forced=True)}
    return {name: lower(model, plans[name], check=True).model for name in names}


@cache
def artifact(kind: str, size: str, mode: str = "stream", target: str = catalogue.HOST) -> NativeArtifact:
    """A model of `oracle_check.KINDS` at a size of `SIZES`, compiled."""
    return build_artifact(variants(traced(kind, size), mode, FRAMES), machine_for(target), lambda _: None)


def run_forced(runtime: Runtime, frames: np.ndarray, decisions: Mapping[str, np.ndarray]) -> np.ndarray:
    """Logits of a clip `[T, K]`, from a reset: at once if the runtime takes it so, else frame by frame."""
    runtime.reset()
    count, feeds = runtime.inputs["frames"].shape[0], {"frames": frames, **decisions}
    steps = [
        runtime.run({name: array[t : t + count] for name, array in feeds.items()})["logits"]
        for t in range(0, len(frames), int(count))
    ]
    return np.concatenate(steps)


def own_steps(runtime: Runtime, frames: np.ndarray) -> list[Step]:
    """What each frame of a clip gives under the model's own decisions."""
    runtime.reset()
    count = int(runtime.inputs["frames"].shape[0])
    runs = (runtime.run({"frames": frames[t : t + count]}) for t in range(0, len(frames), count))
    return [step for outputs in runs for step in steps_of(outputs, 0)]


def assert_same_steps(found: list[Step], expected: list[Step], tolerance: float = TOLERANCE) -> None:
    """Decisions equal, logits equal up to rounding."""
    bound = tolerance * max(float(np.abs(step.logits).max()) for step in expected)
    for t, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.decisions.keys() == theirs.decisions.keys()
        for (gate, kind), value in theirs.decisions.items():
            given = ours.decisions[gate, kind]
            assert given.dtype == value.dtype, (gate, kind)
            assert np.array_equal(given, value), f"frame {t}: {kind} of gate {gate}"
        error = float(np.abs(ours.logits - theirs.logits).max())
        assert error <= bound, f"frame {t}: {error:.3g}, more than {bound:.3g}"


def zoo_network(name: str, mode: str, **settings: object) -> tuple[ir.Model, np.ndarray]:
    """A model of the zoo, traced, and frames: of its sample clip, or under random weights of a texture that moves."""
    net, frames = _zoo_model(name, settings)
    return trace(net, net.preprocess.size), frames


def rounding_error(name: str, **settings: object) -> float:
    """What float32 costs PyTorch itself on `zoo_network`, as a share of the largest logit: no decisions allowed.

    Batch norms calibrated on few small planes amplify rounding.
    """
    net, frames = _zoo_model(name, settings)
    with torch.no_grad():
        single = net(torch.from_numpy(frames)).double()
        double = net.double()(torch.from_numpy(frames).double())
    return float((single - double).abs().max() / double.abs().max())


def _zoo_model(name: str, settings: Mapping[str, object]) -> tuple[VideoModel, np.ndarray]:
    net = build_model(name, None, settings).model
    clip = sample_clip(net.labels)
    if clip is None:
        frames = moving_texture(net.preprocess, net.preprocess.frames)
    else:
        frames = read_clip(clip, net.preprocess).frames
    if settings:
        _calibrate_norms(net, frames)
    return net, frames


def _calibrate_norms(net: nn.Module, frames: np.ndarray) -> None:
    """Take every batch norm's statistics from the frames: under random weights signals would die out on their way."""
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        net(torch.from_numpy(frames))
    net.eval()
