"""Native bundles from export to profile, through the same calls as any other."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import dvexport
from dvexport.bundle.archive import Bundle
from dvexport.bundle.levels import read_gate_level
from dvexport.bundle.slim import slim
from dvexport.cli import main
from dvexport.errors import BundleError, DeviceError, UsageError
from dvexport.models import zoo
from dvexport.profile.run import profile
from dvexport.run.open import open_session
from dvexport.run.oracle import Oracle
from dvexport.targets import catalogue
from dvexport.targets.registry import backend_of
from dvexport.targets.tvm.session import NativeSession
from dvexport.verify import verify
from dvexport.video.clips import write_clip

MODEL = {"width": 0.25, "classes": 5, "size": (64, 64), "frames": 4}


def small(tmp_path, name="x.dvx", **options) -> Bundle:
    settings = {**MODEL, **options.pop("settings", {})}
    return dvexport.export("dstep_resnet18", settings=settings, backend="tvm", output=tmp_path / name, **options)


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> Bundle:
    return small(tmp_path_factory.mktemp("native"))


def test_a_bundle_holds_all_that_a_device_needs(stream):
    names = {f"native/{name}" for name in ("libdvx.so", "runner", "weights.bin", "dvx.h", "gated.plan", "dense.plan")}
    assert names <= set(stream.manifest.files)
    assert {gate.lowering for gate in stream.manifest.gates} == {"kernels"}
    memory = stream.manifest.memory
    assert memory["arena_bound"] <= memory["arena"] <= 1.1 * memory["arena_bound"]
    assert memory["weights"] == stream.manifest.files["native/weights.bin"].size


def test_weights_stand_once_and_winograd_s_in_no_file(stream):
    parameters = sum(p.numel() * 4 for p in zoo.create("dstep_resnet18", **MODEL).parameters())
    stored = sum(entry.size for name, entry in stream.manifest.files.items() if name.endswith("weights.bin"))
    assert stored < 1.4 * parameters  # of rows with gaps, and of policies whose scores are subtracted at export
    assert stream.manifest.memory["derived"] > 0


def test_a_slim_bundle_runs_where_the_whole_one_does(stream, tmp_path):
    made = slim(stream, tmp_path / "slim.dvx", backend_of("tvm").needed(stream))
    assert set(made.manifest.files) == {"native/libdvx.so", "native/weights.bin", "native/gated.plan"}
    frames = stream.golden()["frames"]
    with open_session(Bundle.open(made.path)) as mine, open_session(stream) as whole:
        for got, wanted in zip(mine.run_clip(frames), whole.run_clip(frames), strict=True):
            np.testing.assert_array_equal(got.logits, wanted.logits)
    assert verify(made, whole=stream).ok
    with pytest.raises(BundleError, match=r"'native/dense\.plan' was left out"):
        open_session(made, variant="dense")


@pytest.mark.slow
def test_the_same_export_gives_the_same_bytes(stream, tmp_path):
    assert small(tmp_path).path.read_bytes() == stream.path.read_bytes()


def test_verify_compares_with_the_oracle_and_with_pytorch(stream):
    report = verify(stream)
    assert report.ok, report.rows
    witnesses = {"golden data", "gate-level oracle", "PyTorch"}
    forced = {f"forced decisions, {name}" for name in witnesses}
    assert {row.name.partition(":")[0] for row in report.rows} >= witnesses | forced
    assert all(gate.seen.forced.frames == 8 for gate in report.gates)


def test_a_profile_tells_the_time_of_every_gate(stream):
    result = profile(stream, runs=1, warmup_s=0.0, force={"tiles": 0.5})
    assert result.backend == "tvm"
    assert result.device.runtime == "dvexport native"
    assert all(gate.median_ms > 0 and gate.dense_median_ms > 0 for gate in result.gates)
    roles = {node.role for node in result.nodes}
    assert {"compute", "decide", "move"} <= roles
    assert {node.op for node in result.nodes if node.role == "other"} <= {"max_pool"}


@pytest.mark.slow
def test_a_clip_is_its_stream_from_a_reset(stream, tmp_path):
    clip = small(tmp_path, mode="clip")
    frames = clip.golden()["frames"]
    session = open_session(clip)
    assert session.frames == len(frames)
    once, again, stepped = session.run_clip(frames), session.run_clip(frames), open_session(stream).run_clip(frames)
    for one, two, three in zip(once, again, stepped, strict=True):
        np.testing.assert_array_equal(one.logits, two.logits)
        np.testing.assert_array_equal(one.logits, three.logits)


@pytest.mark.slow
def test_a_model_that_looks_ahead_runs_as_a_clip(tmp_path):
    bundle = dvexport.export("tsm_resnet18", settings=MODEL, backend="tvm", mode="clip", output=tmp_path / "tsm.dvx")
    frames = bundle.golden()["frames"]
    want = Oracle(read_gate_level(bundle)).run_clip(frames)
    for got, expected in zip(open_session(bundle).run_clip(frames), want, strict=True):
        np.testing.assert_allclose(got.logits, expected.logits, atol=1e-4)


# --- threads


MOST = catalogue.load("host").cpu.most_threads


def test_a_bundle_takes_as_many_threads_as_its_target_has_cores(stream):
    frames = stream.golden()["frames"]
    with open_session(stream) as one, open_session(stream, threads=MOST) as most:
        assert most.runtime.max_threads == MOST
        for step, expected in zip(most.run_clip(frames), one.run_clip(frames), strict=True):
            np.testing.assert_allclose(step.logits, expected.logits, atol=1e-4)
    with pytest.raises(UsageError, match=f"threads must be a whole number from 1 to {MOST}, not {MOST + 1}") as caught:
        open_session(stream, threads=MOST + 1)
    assert "all_cores" in str(caught.value.hint)


@pytest.mark.parametrize("threads", [0, -1, MOST + 1, 2**32 + 2])
@pytest.mark.parametrize("command", ["run", "profile"])
def test_the_command_line_refuses_other_numbers(stream, command, threads, tmp_path, capsys):
    clip = tmp_path / "v.mp4"
    write_clip(clip, np.zeros((16, 64, 64, 3), np.uint8), 8)
    with pytest.raises(SystemExit) as left:
        main([command, str(stream.path), "--clip", str(clip), "--threads", str(threads)])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert f"threads must be a whole number from 1 to {MOST}, not {threads}\n" in error
    assert "Traceback" not in error


# --- files that change, and what stays of a session


@pytest.mark.parametrize("how", ["cut", "overwrite"])
@pytest.mark.parametrize("variant", ["gated", "dense"])
def test_a_bundle_that_changes_under_an_open_session_changes_nothing(stream, how, variant, tmp_path):
    frames, copy = stream.golden()["frames"], tmp_path / "copy.dvx"
    copy.write_bytes(stream.path.read_bytes())
    with open_session(Bundle.open(copy), variant=variant) as session, open_session(stream, variant=variant) as other:
        with copy.open("r+b") as file:
            if how == "cut":
                file.truncate(0)
            else:
                file.write(b"\x3f" * stream.path.stat().st_size)
        for step, right in zip(session.run_clip(frames), other.run_clip(frames), strict=True):
            np.testing.assert_array_equal(step.logits, right.logits)


def libraries() -> int:
    """How many mappings of networks' libraries this process has."""
    return sum("network.so" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_sessions_leave_no_library_behind(stream):
    gc.collect()
    before = libraries()
    with open_session(stream):
        assert libraries() > before
        one = libraries() - before
        other = open_session(stream, variant="dense")
        assert libraries() == before + 2 * one  # each has its own
    assert libraries() == before + one
    other.step(stream.golden()["frames"][:1])  # another's end is not its own
    other.close()
    for _ in range(20):
        open_session(stream)  # dropped
        with pytest.raises(DeviceError):  # refused
            NativeSession(stream.read("native/libdvx.so"), b"", b"")
        with pytest.raises(UsageError):
            open_session(stream, threads=0)
    assert libraries() == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_nobody_keeps_a_session(stream):
    """Callers that open a session for the length of a call close it again."""
    gc.collect()
    before = libraries()
    profile(stream, runs=1, warmup_s=0.0)
    verify(stream)
    assert libraries() == before


def test_a_session_closed_in_another_thread_finishes_its_step(stream):
    frames, results = stream.golden()["frames"], []
    session = open_session(stream)

    def steps() -> None:
        with contextlib.suppress(DeviceError):  # closed
            while True:
                results.append(session.step(frames[:1]))

    thread = threading.Thread(target=steps)
    thread.start()
    while len(results) < 3:
        time.sleep(0.001)
    session.close()
    thread.join(10)
    assert not thread.is_alive()


def test_lowerings_are_refused(tmp_path):
    with pytest.raises(UsageError, match="takes no lowerings"):
        small(tmp_path, lowering={"*": "tiles"})
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ziglang" else find(name))
    with pytest.raises(DeviceError, match=r"dvexport\[tvm\]"):
        small(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_bundle_for_another_processor_is_made_here_and_refused_here(tmp_path, monkeypatch):
    bundle = small(tmp_path, target="raspberry-pi-4")
    with pytest.raises(DeviceError):
        open_session(bundle)


def test_it_is_told_whether_code_runs_here():
    here = catalogue.load("host").cpu
    other = catalogue.load("raspberry-pi-4" if here.triple.startswith("x86") else "x86-64-avx2").cpu
    assert catalogue.runs_here(here)
    assert not catalogue.runs_here(other)
    assert "tvm" in sys.modules or importlib.util.find_spec("tvm")


@pytest.mark.slow
def test_an_export_is_trusted_here_and_nowhere_else(stream, tmp_path, monkeypatch):
    frames = stream.golden()["frames"]
    want = open_session(stream).run_clip(frames)[-1].logits
    again = Bundle.open(stream.path)
    np.testing.assert_array_equal(open_session(again).run_clip(frames)[-1].logits, want)
    monkeypatch.setenv("DVEXPORT_STATE", str(tmp_path / "another"))
    with pytest.raises(BundleError, match="not made on this machine by you"):
        open_session(again)
    for trusting in (stream, Bundle.open(stream.path, trust=True)):
        np.testing.assert_array_equal(open_session(trusting).run_clip(frames)[-1].logits, want)
