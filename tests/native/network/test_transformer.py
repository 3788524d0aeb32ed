"""Video transformers through the native backend: whole networks against eager PyTorch, and how their graphs are cut."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
import torch
from emulated import emulator, run_emulated
from native_networks import machine_for

from dvexport import gates
from dvexport.errors import UsageError
from dvexport.models.config import ViTConfig
from dvexport.models.networks.vit import VisionTransformer
from dvexport.passes.pipeline import Request
from dvexport.targets import catalogue
from dvexport.targets.runtime import DEFAULT_THREADS
from dvexport.targets.tvm.artifact import NativeArtifact, build_artifact
from dvexport.targets.tvm.passes import lower
from dvexport.targets.tvm.units.cut import cut
from dvexport.trace import trace

FRAMES = 8
KINDS = {
    "dense": {"sta_r": 0},
    "pruned": {"sta_r": 3},
    "odd": {"sta_r": 5, "embed_dim": 60, "heads": 3, "mlp_ratio": 3.0, "size": (48, 80)},
}
"""64 tokens in 4 groups first; `odd`: 60 tokens of 60 channels, heads of 20, none a multiple of a vector."""


@cache
def network(kind: str) -> VisionTransformer:
    options = {
        "size": (64, 64), "frames": FRAMES, "embed_dim": 96, "depth": 3, "heads": 3, "classes": 7,
        "sta_groups": (4, 2, 1), **KINDS[kind],
    }  # fmt: skip
    torch.manual_seed(3)
    net = VisionTransformer(ViTConfig(**options)).eval()
    with torch.no_grad():
        for parameter in net.parameters():  # biases and norms that do something
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net


@cache
def lowered(kind: str) -> ir.Model:
    net = network(kind)
    plan = Request(mode="clip", frames=FRAMES)
    return lower(trace(net, net.preprocess.size), plan, check=True).model


@cache
def artifact(kind: str, target: str = catalogue.HOST) -> NativeArtifact:
    return build_artifact({"gated": lowered(kind).clone()}, machine_for(target), lambda _: None)


def clip(kind: str) -> np.ndarray:
    size = network(kind).preprocess.size
    return np.random.default_rng(5).standard_normal((FRAMES, 3, *size)).astype(np.float32)


def expected(kind: str) -> np.ndarray:
    with torch.no_grad():
        return network(kind)(torch.from_numpy(clip(kind))).numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2, 3, DEFAULT_THREADS])
def test_logits(kind, threads):
    with artifact(kind).variant("gated", FRAMES).open(threads=threads) as session:
        for _ in range(2):  # memory that the run before left
            session.reset()
            found = session.run({"frames": clip(kind)})
            reference = expected(kind)
            assert np.abs(found["logits"] - reference).max() <= 1e-5 * np.abs(reference).max()


def test_threads_above_the_limit_are_refused():
    """Attention and products of matrices have scratch for so many."""
    with pytest.raises(UsageError, match=f"from 1 to {DEFAULT_THREADS}, not {DEFAULT_THREADS + 1}"):
        artifact("pruned").variant("gated", FRAMES).open(threads=DEFAULT_THREADS + 1)


@pytest.mark.parametrize("kind", ["pruned", "odd"])
def test_choices(kind, monkeypatch):
    """The tokens that go on are those of eager PyTorch, in order."""
    chosen, eager = {}, gates.select_tokens

    def note(x: torch.Tensor, score: torch.Tensor, keep: int, *, gate: str) -> tuple[torch.Tensor, torch.Tensor]:
        kept, index = eager(x, score, keep, gate=gate)
        chosen[f"probe.{gate}.tokens"] = index.numpy()
        return kept, index

    made, net = artifact(kind), network(kind)
    monkeypatch.setattr(gates, "select_tokens", note)
    with torch.no_grad():
        net(torch.from_numpy(clip(kind)))
    with made.variant("gated", FRAMES).open() as session:
        session.reset()
        found = session.run({"frames": clip(kind)})
    assert len(chosen) == 7 and chosen.keys() == {name for name in found if name.endswith(".tokens")}
    for name, index in chosen.items():
        np.testing.assert_array_equal(found[name], index, err_msg=name)


@pytest.mark.parametrize(("kind", "islands"), [("dense", 3), ("pruned", 12)])
def test_units(kind, islands):
    """Every layer has its kernel: what splits heads is taken along, and no copy is left between."""
    units = cut(lowered(kind).clone())
    kinds = Counter(unit.kind for unit in units)
    assert kinds["attention"] == 3
    assert kinds["layer_norm"] == 7
    assert kinds["linear"] == 3 * 4 + 1 + (3 if kind == "pruned" else 0)
    assert kinds["select_tokens"] == (7 if kind == "pruned" else 0)
    assert kinds["island"] <= islands
    left = {node.op_type for unit in units if unit.kind == "island" for node in unit.nodes}
    assert not left & {"Conv", "LayerNormalization", "Gelu", "SelectTokens"}


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_near_the_bound(kind):
    memory = artifact(kind).memory
    assert memory["arena"] <= 1.05 * memory["arena_bound"]


@pytest.mark.parametrize(("target", "architecture", "cpu"), [
    ("raspberry-pi-4", "aarch64", "cortex-a72"), ("rv1126", "arm", "cortex-a7"),
])  # fmt: skip
def test_on_arm(target, architecture, cpu):
    with artifact("odd").variant("gated", FRAMES).open() as session:
        ports = list(session.inputs), dict(session.outputs)
        session.reset()
        here = session.run({"frames": clip("odd")})
    made, feeds = artifact("odd", target), {"frames": clip("odd")[None]}
    found = run_emulated(made, "gated", feeds, ports, [emulator(architecture), "-cpu", cpu], 2)
    reference = expected("odd")
    assert np.abs(found["logits"] - reference).max() <= 1e-5 * np.abs(reference).max()
    for name in ports[1]:
        if name.endswith(".tokens"):
            np.testing.assert_array_equal(found[name], here[name])
