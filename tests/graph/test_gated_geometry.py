"""Every attribute that a gated convolution may have: exported, forced, and compared with eager PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gated_layers import CIN, COUT, FRAMES, SIZE, Layer, decisions_of, frames_of, lively
from graphs import run_steps, session
from native_harness import host_machine
from native_networks import variants
from torch import nn
from torch.nn.utils import parametrizations

from dvexport.passes.pipeline import Request
from dvexport.targets.onnx.passes import lower
from dvexport.targets.tvm.artifact import build_artifact
from dvexport.targets.tvm.units.cut import cut
from dvexport.trace import trace


def conv(kernel, **options):
    return nn.Conv2d(CIN, COUT, kernel, **options)


def wider(**changes):
    """A layer whose attributes were set later, as surgery on a model does."""
    made = nn.Conv2d(CIN, 7, 3)
    made.weight = nn.Parameter(torch.randn(COUT, CIN, 3, 3) / 5)
    made.bias = nn.Parameter(torch.randn(COUT))
    for name, value in changes.items():
        setattr(made, name, value)
    return made


LAYERS = {
    "plain": lambda: Layer(conv(3, padding=1), nn.BatchNorm2d(COUT)),
    "kernel by axis": lambda: Layer(conv((1, 5), padding=(0, 2), bias=False)),
    "stride by axis": lambda: Layer(conv(3, padding=1, stride=(1, 2)), nn.BatchNorm2d(COUT)),
    "stride down": lambda: Layer(conv((3, 2), padding=(2, 1), stride=(3, 1), dilation=(1, 3))),
    "stride three": lambda: Layer(conv(3, stride=3), nn.BatchNorm2d(COUT)),
    "stride five across": lambda: Layer(conv((2, 5), stride=(4, 5), padding=(1, 2), dilation=(1, 2))),
    "padding by axis": lambda: Layer(conv((5, 3), padding=(1, 3))),
    "padding beyond the window": lambda: Layer(conv(1, padding=3)),
    "padding valid": lambda: Layer(conv(3, padding="valid"), nn.BatchNorm2d(COUT)),
    "padding same": lambda: Layer(conv((2, 4), padding="same")),
    "padding same, dilated": lambda: Layer(conv((4, 3), padding="same", dilation=(1, 2))),
    "dilation": lambda: Layer(conv(3, padding=2, dilation=2), nn.BatchNorm2d(COUT)),
    "dilation by axis": lambda: Layer(conv(3, padding=(3, 1), dilation=(3, 1), stride=2)),
    "no bias": lambda: Layer(conv(3, bias=False)),
    "a grid finer than its plane": lambda: Layer(conv(5, stride=2), grid=(7, 9)),
    "norm without scale": lambda: Layer(conv(3, padding=1), nn.BatchNorm2d(COUT, affine=False, eps=0.1)),
    "synchronised norm": lambda: Layer(conv(3, bias=False), nn.SyncBatchNorm(COUT)),
    "attributes set later": lambda: Layer(wider(padding=(1, 1), stride=(2, 2), dilation=(1, 2))),
    "weight norm": lambda: Layer(parametrizations.weight_norm(conv(3))),
    "spectral norm": lambda: Layer(parametrizations.spectral_norm(conv(3, padding=1)), nn.BatchNorm2d(COUT)),
    "no activation": lambda: Layer(conv(3, dilation=(1, 2)), activation="none"),
    "a dilated reader": lambda: Layer(
        conv(3, padding=1), reader=nn.Conv2d(COUT, 4, (2, 3), padding=(2, 0), dilation=(3, 2), stride=(2, 1))
    ),
}
FAST = ("stride by axis", "padding same, dilated", "norm without scale")
"""Those that the fast tests run, in a stream."""
NATIVE = (
    "kernel by axis", "stride by axis", "stride down", "stride three", "stride five across",
    "padding beyond the window", "padding same, dilated",
    "dilation by axis", "a grid finer than its plane", "a dilated reader",
)  # fmt: skip
"""Those that differ to kernels; a trace has folded the rest into weights."""


@pytest.fixture(scope="module")
def layers():
    made = {}

    def get(name):
        if name not in made:
            net = lively(LAYERS[name])
            made[name] = net, trace(net, SIZE)
        return made[name]

    return get


def assert_equal(found, expected, what):
    assert found.shape == expected.shape
    error = np.abs(found - expected).max()
    assert error <= 1e-5 * max(1.0, np.abs(expected).max()), f"{what}: {error:.3g}"


def assert_follows(net, traced, mode, lowering):
    plan = Request(mode=mode, frames=FRAMES, forced=True, overrides={"*": lowering})
    model, frames = lower(traced, plan, check=True).model, frames_of()
    loaded = session(model)
    for pattern, decisions in decisions_of(net.grid).items():
        feeds = {"frames": frames, **decisions}
        found = loaded.run(None, feeds)[0] if mode == "clip" else run_steps(model, feeds, loaded=loaded)["logits"]
        assert_equal(found, net.eager(frames, decisions), f"{mode} {lowering} {pattern}")


@pytest.mark.parametrize("name", FAST)
def test_forced_on_onnx(layers, name):
    for lowering in ("masked", "tiles"):
        assert_follows(*layers(name), "stream", lowering)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_forced_in_every_lowering(layers, name):
    for lowering in ("tiles", "channels", "groups"):
        assert_follows(*layers(name), "stream", lowering)
    assert_follows(*layers(name), "clip", "tiles")


@pytest.mark.slow
@pytest.mark.parametrize("name", NATIVE)
def test_forced_natively(layers, name):
    net, traced = layers(name)
    frames = frames_of()
    models = variants(traced, "stream", 1, ("gated", "forced"))
    runtime = build_artifact(models, host_machine(), lambda _: None).variant("forced", 1).open()
    for pattern, decisions in decisions_of(net.grid).items():
        runtime.reset()
        feeds = {"frames": frames, **decisions}
        steps = [runtime.run({key: value[t : t + 1] for key, value in feeds.items()})["logits"] for t in range(FRAMES)]
        assert_equal(np.concatenate(steps), net.eager(frames, decisions), pattern)


def test_pools_of_steps_beyond_two_are_islands():
    net = lively(
        lambda: nn.Sequential(nn.MaxPool2d(3, 3), nn.Conv2d(CIN, CIN, 1), Layer(conv(3), nn.BatchNorm2d(COUT)))
    )
    models = variants(trace(net, (33, 42)), "stream", 1, ("gated",))
    assert "max_pool" not in {unit.kind for unit in cut(models["gated"])}


def test_decisions_and_geometry_matter():
    """Were either ignored on both sides, every comparison above would hold."""
    net, frames = lively(LAYERS["dilation"]), frames_of()
    outputs = [net.eager(frames, decisions) for decisions in decisions_of(net.grid).values()]
    assert min(np.abs(a - b).max() for i, a in enumerate(outputs) for b in outputs[:i]) > 0.1
    net.conv.dilation, net.conv.padding = (1, 1), (1, 1)
    assert np.abs(net.eager(frames, decisions_of(net.grid)["all"]) - outputs[0]).max() > 0.1
