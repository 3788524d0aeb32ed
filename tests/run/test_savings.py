"""What an export says of what its artifact will save, and which backend it takes where none is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from bundles import small_bundle
from sample_bundle import make_manifest

from dvexport.bundle.archive import Bundle
from dvexport.bundle.manifest import FileEntry
from dvexport.cli.closing import backend_line, next_line, saved_lines
from dvexport.decisions import ACTION, TILES, Action
from dvexport.dialect.flops import FlopTable
from dvexport.errors import DeviceError, UsageError
from dvexport.passes.lowerings import KERNELS
from dvexport.run.golden import unpack
from dvexport.run.savings import Savings, savings_of
from dvexport.targets import catalogue, registry


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return small_bundle("dstep_resnet18", "stream")


def _lowered(bundle: Bundle, *kinds: str) -> Bundle:
    """The bundle as if its gates had become `kinds`, over and over."""
    gates = [
        gate.model_copy(update={"lowering": kinds[i % len(kinds)]}) for i, gate in enumerate(bundle.manifest.gates)
    ]
    return dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"gates": gates}))


def test_kernels_keep_all_that_decisions_leave_out_and_masks_nothing(bundle):
    table = FlopTable.from_dict(bundle.manifest.flops)
    steps = [step.decisions for step in unpack(bundle.golden())[1]]
    asked = 1 - np.mean(table.executed(steps).frames) / table.dense
    assert 0 < asked < 1
    kernels, masked = (savings_of(_lowered(bundle, kind)) for kind in (KERNELS, "masked"))
    assert kernels == Savings(pytest.approx(asked), pytest.approx(asked), len(bundle.manifest.gates), ())
    assert masked.asked == kernels.asked
    assert masked.kept == pytest.approx(-table.decisions / table.dense)  # deciding is paid for, nothing is saved
    assert masked.idle == tuple(gate.name for gate in bundle.manifest.gates)


def test_a_lowering_keeps_only_what_the_decision_it_follows_leaves_out(bundle):
    table = FlopTable.from_dict(bundle.manifest.flops)
    everything = {ACTION.name: Action.COMPUTE, TILES.name: 1}
    for lowering, follows in (("tiles", TILES), ("winograd4", TILES), ("channels", ACTION), ("groups", ACTION)):
        steps = [
            {
                key: v if key[1] == follows.name else np.full_like(v, everything[key[1]])
                for key, v in step.decisions.items()
            }
            for step in unpack(bundle.golden())[1]
        ]
        found = savings_of(_lowered(bundle, lowering))
        assert found.kept == pytest.approx(1 - np.mean(table.executed(steps).frames) / table.dense)
        assert found.kept < found.asked
        assert found.idle == ()


def test_half_of_the_gates_masked_is_in_between(bundle):
    half = savings_of(_lowered(bundle, KERNELS, "masked"))
    assert savings_of(_lowered(bundle, "masked")).kept < half.kept < half.asked
    assert len(half.idle) == half.gates // 2


def _says(backend: str, kept: float = 0.3, idle: int = 0, target: str = "raspberry-pi-5") -> str:
    saved = Savings(0.5, kept, 16, tuple(f"g{i}" for i in range(idle)))
    (line,) = saved_lines(saved, backend, catalogue.load(target))
    return line


def test_what_is_said_of_savings(monkeypatch):
    assert saved_lines(None, "onnx", catalogue.load("host")) == []
    assert _says("tvm", 0.5) == "saves 50% of the multiply-accumulates on its golden frames"
    assert _says("tvm", -0.1).startswith("saves 0% ")
    nothing = "16 gates masked: this artifact saves nothing on this target"
    assert _says("onnx", 0, 16) == f"{nothing}; --backend tvm does"
    assert _says("onnx", 0.3, 4).endswith(", 50% were not asked for: 4 of 16 gates are masked; --backend tvm does")

    def missing(*_):
        raise DeviceError("compiled kernels need packages", hint="pip install it")

    monkeypatch.setattr(registry.backend_of("tvm"), "check", missing)
    assert _says("onnx", 0, 16) == f"{nothing}; --backend tvm does (pip install it)"

    def unfit(*_):
        raise UsageError("not there")

    monkeypatch.setattr(registry.backend_of("tvm"), "check", unfit)
    assert _says("onnx", 0, 16) == nothing


def test_the_best_backend_that_fits_and_is_installed_is_taken(monkeypatch):
    host = catalogue.load("host")
    assert registry.best_backend(host) == ("tvm", {})
    name, refused = registry.best_backend(host, {"layer1.0": "tiles"})
    assert (name, list(refused)) == ("onnx", ["tvm"])
    assert backend_line(name, refused) == "backend: onnx (backend 'tvm' takes no lowerings)"
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None if module == "tvm" else object())
    name, refused = registry.best_backend(host)
    assert name == "onnx"
    assert backend_line(name, refused).endswith("not installed: pip install 'dvexport[tvm]')")
    with pytest.raises(DeviceError, match="not installed"):
        registry.best_backend(catalogue.load("rv1126"))  # which runs compiled kernels only


@pytest.mark.parametrize(
    ("artifact", "target", "line"),
    [
        ("model.onnx", "raspberry-pi-5", "next: dvexport verify a/b.dvx"),  # which runs wherever its runtime does
        ("native/network.so", "host", "next: dvexport verify a/b.dvx"),
        ("native/network.so", "rv1126", "next: copy it to the device, and there: dvexport verify b.dvx --trust"),
    ],
)
def test_machine_code_of_another_processor_is_verified_on_the_device(artifact, target, line):

    entry = FileEntry(size=1, sha256="0" * 64)
    manifest = make_manifest().model_copy(update={"files": {artifact: entry}})
    assert next_line(manifest, Path("a/b.dvx"), catalogue.load(target)) == line
