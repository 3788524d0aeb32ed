"""The C runtime through Python and as a program: numbers, states, choices, threads, errors."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from native_harness import aligned, host_machine
from runtime_plans import (
    CHANNELS,
    EXAMPLE_TARGETS,
    MOST_THREADS,
    Network,
    add,
    expected,
    fixed,
    frames,
    network,
    relu,
    sample_kernels,
    sample_network,
    sample_plan,
)

from dvexport.errors import DeviceError
from dvexport.targets.tvm import build, link
from dvexport.targets.tvm.build import compile_kernel
from dvexport.targets.tvm.plan import Place, Space
from dvexport.targets.tvm.session import NativeSession

CODE_LIMIT = 100_000
"""Bytes of code and data that the runtime may have (issue 3)."""

slow_once = pytest.mark.slow
"""The compiler builds a C library for a processor it has not linked for yet: up to a minute each."""

EMULATORS = {
    "raspberry-pi-4": ("qemu-aarch64-static", "cortex-a72"),
    "android-arm64": ("qemu-aarch64-static", "cortex-a76"),
    "rv1126": ("qemu-arm-static", "cortex-a7"),
}
WEAKER = {"android-arm64": ("cortex-a72", "lse"), "x86-64-avx512": ("Nehalem", "avx512f")}
"""By target: a processor that lacks a feature, and the first that is missed."""


def opened(net: Network, **options) -> NativeSession:
    return NativeSession(net.library, net.plan, net.weights, **options)


def run(session: NativeSession, given: np.ndarray) -> list[dict[str, np.ndarray]]:
    return [session.run({"x": frame}) for frame in given]


def assert_expected(results: list[dict[str, np.ndarray]], given: np.ndarray) -> None:
    for result, right in zip(results, expected(given), strict=True):
        for name, value in right.items():
            assert result[name].dtype == value.dtype, name
            np.testing.assert_allclose(result[name], value, rtol=1e-6, err_msg=name)


# --- numbers and states


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_steps_give_the_numbers_and_keep_the_states(threads):
    given = frames(9)
    with opened(sample_network(), threads=threads) as session:
        assert_expected(run(session, given), given)
        assert session.seconds > 0


def test_reset_starts_a_fresh_stream():
    given = frames(5)
    with opened(sample_network()) as session:
        run(session, given[::-1])  # an odd number of steps: the halves of the flip space are exchanged
        session.reset()
        assert_expected(run(session, given), given)


def test_ports_are_those_of_the_plan():
    with opened(sample_network()) as session:
        assert {name: (port.shape, str(port.dtype)) for name, port in session.inputs.items()} == {
            "x": ((1, CHANNELS), "float32")
        }
        assert list(session.outputs) == [port.name for port in sample_plan().outputs]
        assert session.outputs["probe.g.tiles"].shape == (1, 2, 2)
        assert session.outputs["probe.g.action"].dtype == np.int64
        assert session.memory == sample_plan().memory


def test_weights_from_a_file_and_in_place(tmp_path):
    net, given = sample_network(), frames(3)
    file = tmp_path / "weights"
    file.write_bytes(net.weights)
    with NativeSession(net.library, net.plan, file) as session:
        assert_expected(run(session, given), given)
        assert not session.info.weights_copied
    memory = aligned(np.frombuffer(net.weights + b"\0", np.uint8))
    for offset, copied in ((0, False), (1, True)):
        memory[offset : offset + len(net.weights)] = np.frombuffer(net.weights, np.uint8)
        view = memoryview(memory)[offset : offset + len(net.weights)]
        with NativeSession(net.library, net.plan, view) as session:
            assert_expected(run(session, given), given)
            assert bool(session.info.weights_copied) == copied


def test_several_instances_at_once_in_several_threads():
    net = sample_network()

    def stream(seed: int) -> None:
        given = np.random.default_rng(seed).standard_normal((50, 1, CHANNELS)).astype(np.float32)
        with opened(net, threads=1 + seed % 3) as session:
            assert_expected(run(session, given), given)

    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        list(executor.map(stream, range(8)))


# --- what is called, and by whom


def test_calls_are_chosen_by_cost_and_skipped_at_zero():
    with opened(sample_network(), profile=True) as session:
        for count, kernel in [(0, None), (1, "copy_few"), (40, "copy_few"), (60, "copy_many"), (200, "copy_many")]:
            frame = np.where(np.arange(CHANNELS) < count, 1, -1).astype(np.float32)[None]
            session.run({"x": frame})
            copy = next(call for call in session.call_times() if call.label == "gate/copy")
            assert (copy.gate, copy.kernel, copy.counts) == ("g", kernel, (count, None, None))
            assert copy.threads == (0 if kernel is None else 1)
        calls = session.call_times()
        assert [call.label for call in calls] == [call.label for call in sample_plan().calls]
        assert 0 < sum(call.seconds for call in calls) <= session.seconds
        assert len(session.end_profile()) == 5


def test_weights_are_waited_for_by_lines_or_in_a_row():
    with opened(sample_network(), profile=True) as session:
        for count, kernel in [
            (1, "copy_few"),
            (40, "copy_few"),
            (60, "copy_many"),
            (105, "copy_many"),
            (120, "copy_few"),
        ]:
            frame = np.where(np.arange(CHANNELS) < count, 1, -1).astype(np.float32)[None]
            session.run({"x": frame})
            waited = next(call for call in session.call_times() if call.label == "gate/wait")
            assert (waited.kernel, waited.counts) == (kernel, (None, count, None))


def test_a_variant_for_some_number_of_vectors_is_taken_for_no_other():
    with opened(sample_network(), profile=True) as session:
        for count, kernel in [(0, None), (6, "copy_few"), (7, "copy_many"), (8, "copy_few")]:
            frame = np.where(np.arange(CHANNELS) < count, 1, -1).astype(np.float32)[None]
            session.run({"x": frame})
            exact = next(call for call in session.call_times() if call.label == "gate/exact")
            assert (exact.kernel, exact.counts) == (kernel, (None, None, count))


def test_only_expensive_kernels_that_split_are_shared():
    steps = 200
    with opened(sample_network(), threads=3, profile=True) as session:
        result = run(session, np.repeat(frames(1), steps, axis=0))[-1]
        assert result["ran0"].tolist() == [3, 3, 3, 0, 0, 0, 0, 0, steps]
        for name in ("ran1", "ran2"):  # too short; does not split
            assert result[name].tolist() == [1, 0, 0, 0, 0, 0, 0, 0, steps]
        by_label = {call.label: call.threads for call in session.call_times()}
        assert by_label["who/expensive"] == 3
        assert by_label["who/cheap"] == by_label["who/alone"] == 1
        assert by_label["layer1/relu"] == 3  # of unknown cost


def test_threads_sleep_between_steps_and_wake():
    with opened(sample_network(), threads=MOST_THREADS) as session:
        import time

        for _ in range(5):
            before = time.process_time()
            session.run({"x": frames(1)[0]})
            time.sleep(0.05)
            assert time.process_time() - before < 0.04  # seven spinning threads would use 0.1 or more
        assert session.run({"x": frames(1)[0]})["ran0"].tolist() == [MOST_THREADS] * MOST_THREADS + [6]


def test_threads_are_pinned_where_they_may_be():
    core = min(os.sched_getaffinity(0))
    with opened(sample_network(), threads=3, cores=[core] * 3) as session:
        assert session.info.pinned == 2
    with opened(sample_network(), threads=2, cores=[core, 1023]) as session:
        assert session.info.pinned == 0


# --- wrong use


def test_step_before_reset_is_an_error(monkeypatch):
    monkeypatch.setattr(NativeSession, "reset", lambda self: None)
    with opened(sample_network()) as session, pytest.raises(DeviceError, match="step before reset"):
        session.run({"x": frames(1)[0]})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_frame_that_is_not_finite_changes_no_state(bad):
    given = frames(4)
    with opened(sample_network()) as session:
        results = run(session, given[:2])
        wrong = given[2].copy()
        wrong[0, -1] = bad
        with pytest.raises(DeviceError, match="input x has NaN or infinite values"):
            session.run({"x": wrong})
        assert_expected(results + run(session, given[2:]), given)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "the input 'x' is missing"),
        ({"x": np.zeros((1, 3), np.float32)}, r"must be float32 of shape \[1, 200\]"),
        ({"x": np.zeros((1, CHANNELS))}, "it is float64"),
        ({"x": np.zeros((1, CHANNELS), np.float32), "z": np.zeros(1)}, "there is no input 'z'"),
    ],
)
def test_wrong_feeds(feeds, message):
    with opened(sample_network()) as session, pytest.raises(DeviceError, match=message):
        session.run(feeds)


def test_a_closed_session_says_so():
    session = opened(sample_network())
    session.close()
    session.close()
    with pytest.raises(DeviceError, match="is closed"):
        session.run({"x": frames(1)[0]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 33}, "threads is 33"),
        ({"threads": -1}, "threads is -1"),
        ({"threads": 2, "cores": [0]}, "1 cores were given for 2 threads"),
        ({"threads": 1, "cores": [-1]}, "there is no core -1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(DeviceError, match=message):
        opened(sample_network(), **options)


def test_a_library_for_another_machine():
    with pytest.raises(DeviceError, match="can't be loaded on this machine"):
        NativeSession(b"\x7fELF" + bytes(100), b"", b"")


# --- damaged files

HEADER, PORT, CALL = 128, 80, 64
PORTS = len(sample_plan().inputs) + len(sample_plan().outputs)
CALLS_AT = HEADER + PORTS * PORT
VARIANTS_AT = CALLS_AT + len(sample_plan().calls) * CALL
ARGUMENTS_AT = VARIANTS_AT + 56 * sum(len(call.variants) for call in sample_plan().calls)


def _set(offset: int, layout: str, *values: int | float):
    def change(plan: bytes) -> bytes:
        data = bytearray(plan)
        struct.pack_into(layout, data, offset, *values)
        return fixed(bytes(data))

    return change


DAMAGE = {
    "empty": (lambda plan: b"", "this is no plan"),
    "another file": (lambda plan: b"PK\3\4" + plan[4:], "this is no plan"),
    "truncated header": (lambda plan: plan[:100], "the plan is truncated"),
    "truncated": (lambda plan: plan[:-8], "the plan is truncated"),
    "longer": (lambda plan: plan + bytes(8), "longer than the plan"),
    "newer": (_set(8, "<I", 3), "format version 3, this library reads version 2"),
    "checksum": (lambda plan: plan[:200] + bytes([plan[200] ^ 1]) + plan[201:], "its checksum is wrong"),
    "another library": (_set(64, "<I", 1), "the plan is for another library"),
    "reserved": (_set(120, "<I", 1), "reserved bytes are set"),
    "counts": (_set(100, "<I", 4000), "its tables do not fill the file"),
    "huge arena": (_set(40, "<Q", 1 << 60), "needs more memory than there can be"),
    "large arena": (_set(40, "<Q", 1 << 50), "MiB of memory, this device has"),
    "small arena": (_set(40, "<Q", 64), "lies outside its memory space"),
    "weights size": (_set(32, "<Q", 128), "the weights are truncated: 64 of 128 bytes"),
    "first variant for some": (_set(VARIANTS_AT + 12, "<I", 7), "call 0 has no variant for any number of vectors"),
    "port type": (_set(HEADER + 4, "<I", 4), "port 0 has a bad name, type or rank"),
    "port rank": (_set(HEADER + 8, "<I", 7), "port 0 has a bad name, type or rank"),
    "port name": (_set(HEADER, "<I", 1 << 31), "port 0 has a bad name, type or rank"),
    "port sizes": (_set(HEADER + 32, "<q", -1), "the sizes of port 0 do not fit"),
    "port overflow": (_set(HEADER + 32, "<qq", 1 << 62, 4 * CHANNELS), "the sizes of port 0 do not fit"),
    "port more sizes": (_set(HEADER + 48, "<q", 1), "port 0 has more sizes than dimensions"),
    "port place": (_set(HEADER + 16, "<Q", 1 << 56 | 8192), "port 0 lies outside its memory space"),
    "port unaligned": (_set(HEADER + 16, "<Q", 1 << 56 | 2), "port 0 is not aligned"),
    "no space": (_set(HEADER + 16, "<Q", 5 << 56), "port 0 is in no memory space"),
    "label": (_set(CALLS_AT + 8, "<I", 1 << 20), "call 0 has a bad label or gate"),
    "no variants": (_set(CALLS_AT + 4, "<I", 0), "call 0 names variants that do not exist"),
    "variants": (_set(CALLS_AT, "<II", 0xFFFFFFFF, 2), "call 0 names variants that do not exist"),
    "count": (_set(CALLS_AT + 16, "<QQ", 1 << 56, 2), "a count of call 0 is no int32 list"),
    "count place": (_set(CALLS_AT + 16, "<QQ", 1 << 56 | 8192, 4), "a count of call 0 lies outside"),
    "kernel": (_set(VARIANTS_AT, "<I", 99), "variant 0 names kernel 99 of 7"),
    "argument count": (_set(VARIANTS_AT + 8, "<I", 2), "variant 0 gives 2 buffers to relu, which takes 3"),
    "arguments": (_set(VARIANTS_AT + 4, "<I", 0xFFFFFFFF), "variant 0 names arguments that do not exist"),
    "cost": (_set(VARIANTS_AT + 16, "<f", np.nan), "variant 0 has no finite cost"),
    "argument": (_set(ARGUMENTS_AT, "<QQ", 1 << 56, 8193), "argument 0 lies outside its memory space"),
    "argument overflow": (_set(ARGUMENTS_AT, "<QQ", 1 << 56 | 64, 2**64 - 1), "argument 0 lies outside"),
    "no argument": (_set(ARGUMENTS_AT, "<QQ", 2**64 - 1, 2**64 - 1), "argument 0 is in no memory space"),
    "endless strings": (lambda plan: fixed(plan[:-1] + b"x"), "its strings do not end"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_plan_is_refused(kind):
    change, message = DAMAGE[kind]
    net = sample_network()
    with pytest.raises(DeviceError) as caught:
        NativeSession(net.library, change(net.plan), net.weights)
    assert message in str(caught.value)


def test_an_input_may_not_lie_in_the_weights():
    plan = sample_plan()
    place = Place(Space.WEIGHTS, 0, 4 * CHANNELS)
    plan.inputs = [dataclasses.replace(plan.inputs[0], place=place)]
    net = network(plan, sample_kernels(), bytes(4 * CHANNELS), host_machine())
    with pytest.raises(DeviceError, match="input 0 lies in the weights"):
        opened(net)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "the weights are truncated: 63 of 64 bytes"),
        (lambda data: b"", "the weights are truncated: 0 of 64 bytes"),
        (lambda data: data + b"\0", "65 bytes, not 64"),
        (lambda data: b"\1" + data[1:], "their checksum is wrong"),
    ],
)
def test_damaged_weights_are_refused(change, message, tmp_path):
    net = sample_network()
    file = tmp_path / "weights"
    file.write_bytes(change(net.weights))
    for weights in (change(net.weights), file):
        with pytest.raises(DeviceError, match=message):
            NativeSession(net.library, net.plan, weights)


def test_weights_that_can_not_be_read(tmp_path):
    net = sample_network()
    for path, message in ((tmp_path / "none", "No such file"), (tmp_path, "can't read the weights")):
        with pytest.raises(DeviceError, match=message):
            NativeSession(net.library, net.plan, path)


# --- linking


def test_equal_input_gives_equal_bytes_without_paths(monkeypatch, tmp_path):
    net = sample_network()
    monkeypatch.setenv("DVEXPORT_CACHE", str(tmp_path))
    runner = link.link_runner(net.objects, net.table, net.machine)
    monkeypatch.setenv("DVEXPORT_CACHE", str(tmp_path / "other"))
    assert link.link_library(net.objects, net.table, net.machine) == net.library
    assert link.link_runner(net.objects, net.table, net.machine) == runner
    for text in (tempfile.gettempdir(), str(Path.home()), str(Path(link.__file__).parents[2]), sys.prefix):
        for data in (net.library, runner):
            assert text.encode() + b"/" not in data


def test_the_library_shows_only_its_interface():
    net = sample_network()
    names = {name.decode() for name in re.findall(rb"\bdvx_\w+\b", net.library)}
    declared = set(re.findall(r"DVX_API [^;]*?\b(dvx_\w+)\(", (link.RUNTIME / "dvx.h").read_text()))
    assert declared and declared <= names
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "library.so"
        path.write_bytes(net.library)
        nm = shutil.which("nm")
        if nm is None:
            pytest.skip("nm is not installed")
        listed = subprocess.run([nm, "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1].partition("@")[0] for line in listed.splitlines()} == declared


def test_the_identity_follows_kernels_and_machine():
    net = sample_network()
    base = link.library_id(net.objects, net.table, net.machine)
    changed = {**net.objects, "relu": net.objects["relu"] + b"\0"}
    other = dataclasses.replace(net.table[0], splits=not net.table[0].splits)
    assert base == link.library_id(net.objects, net.table, net.machine)
    assert base != link.library_id(changed, net.table, net.machine)
    assert base != link.library_id(net.objects, [other, *net.table[1:]], net.machine)
    assert base != link.library_id(net.objects, net.table, dataclasses.replace(net.machine, mcpu="x86-64-v2"))


def test_features_are_known_to_the_runtime():
    text = (link.RUNTIME / "cpu.c").read_text()
    known = set(re.findall(r'\{"([a-z0-9.-]+)",', text))
    assert known == {name for names in link._FEATURES.values() for name in names}
    assert {"avx512f", "fma", "avx2"} <= set(link.required_features(sample_network("x86-64-avx512").machine))
    assert link.required_features(sample_network("raspberry-pi-4").machine) == ("neon",)
    assert {"lse", "dotprod"} <= set(link.required_features(sample_network("android-arm64").machine))
    assert {"neon", "vfp4"} <= set(link.required_features(sample_network("rv1126").machine))


def test_missing_packages_are_named(monkeypatch):
    net = sample_network()
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"pip install 'dvexport\[tvm\]'"):
        link.link_library(net.objects, net.table, net.machine)


def test_a_kernel_that_calls_what_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("DVEXPORT_CACHE", str(tmp_path))
    net = sample_network()
    table = [*net.table, link.Entry("not_there", 2, False)]
    elsewhere = compile_kernel(add("elsewhere"), net.machine)
    with pytest.raises(DeviceError, match="not_there"):
        link.link_library({**net.objects, "not_there": elsewhere}, table, net.machine)


@slow_once
def test_android_needs_only_what_android_has():
    net = sample_network("android-arm64")
    library = link.link_library(net.objects, net.table, net.machine)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "library.so"
        path.write_bytes(library)
        if (readelf := shutil.which("readelf")) is None:
            pytest.skip("readelf is not installed")
        text = subprocess.run([readelf, "-dW", "--dyn-syms", path], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"NEEDED.*\[(.*)\]", text)) <= {"libc.so", "libm.so"}
    undefined = set(re.findall(r" UND (\w+)", text))
    assert "pthread_create" in undefined
    assert undefined <= set(link._ANDROID_LIBC) | set(link._ANDROID_LIBM)
    assert {"dvx_open", "dvx_step"} <= set(re.findall(r"DEFAULT +\d+ (\w+)", text))


def test_the_example_of_the_header_works(tmp_path):
    header = (link.RUNTIME / "dvx.h").read_text()
    body = "\n".join(line.removeprefix(" *") for line in header.splitlines() if line.startswith(" *     "))
    program = "\n".join(
        [
            '#include <stdio.h>\n#include "dvx.h"',
            f"static float frame[{CHANNELS}];",
            "static int read_frame(float *to) { return fread(to, sizeof frame, 1, stdin) == 1; }",
            "int main(void) {",
            body.replace("dvx_output_data(net, 0);", 'dvx_output_data(net, 0); printf("%.9g\\n", logits[7]);'),
            "return 0; }\n",
        ]
    )
    net, given = sample_network(), frames(5)
    for name, data in {"libnet.so": net.library, "model.plan": net.plan, "model.weights": net.weights}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "main.c").write_text(program)
    compiler = [sys.executable, "-m", "ziglang", "cc", "-Wall", "-Wextra", "-Werror", f"-I{link.RUNTIME}"]
    command = [*compiler, "main.c", "-o", "main", "-L.", "-lnet", "-Wl,-rpath,$ORIGIN"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "main"], cwd=tmp_path, input=given.tobytes(), capture_output=True, check=True)
    np.testing.assert_allclose([float(line) for line in done.stdout.split()], np.maximum(given[:, 0, 7], 0), rtol=1e-6)


# --- the runner


def prepared(net: Network, folder: Path, given: np.ndarray) -> list[str]:
    """Write the runner and its files into `folder` and return the command that measures `given`."""
    runner = folder / "runner"
    runner.write_bytes(link.link_runner(net.objects, net.table, net.machine))
    runner.chmod(0o755)
    (folder / "plan").write_bytes(net.plan)
    (folder / "weights").write_bytes(net.weights)
    (folder / "frames").write_bytes(given.tobytes())
    files = [str(folder / name) for name in ("runner", "plan", "weights")]
    return [*files, "--frames", str(folder / "frames"), "--dump", str(folder / "dump")]


def dumped(folder: Path, steps: int) -> list[dict[str, np.ndarray]]:
    """Read back what `--dump` wrote."""
    data, at, results = (folder / "dump").read_bytes(), 0, []
    for _ in range(steps):
        result = {}
        for port in sample_plan().outputs:
            size = port.place.size
            result[port.name] = np.frombuffer(data[at : at + size], port.dtype).reshape(port.shape)
            at += size
        results.append(result)
    assert at == len(data)
    return results


def check_runner(command: list[str], folder: Path, given: np.ndarray) -> None:
    more = ["--steps", "12", "--warmup", "3", "--threads", "2", "--profile"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    seen = given[np.arange(12) % len(given)]
    assert_expected(dumped(folder, 12), seen)
    right = expected(seen)
    assert (report["steps"], report["threads"], report["memory"]) == (12, 2, sample_plan().memory)
    assert len(report["steps_ns"]) == 12
    assert report["step_ns"]["min"] <= report["step_ns"]["median"] <= report["step_ns"]["max"]
    computed = np.mean([step["probe.g.action"] == 2 for step in right])
    gate = report["gates"]["probe.g.action"]
    assert gate["compute"] == pytest.approx(computed, abs=1e-5)
    assert gate["skip"] == pytest.approx(1 - computed, abs=1e-5)
    active = np.mean([step["probe.g.tiles"] for step in right])
    assert report["gates"]["probe.g.tiles"]["active"] == pytest.approx(active, abs=1e-5)
    np.testing.assert_allclose(report["outputs"]["total"], right[-1]["total"], rtol=1e-6)
    copy = report["calls"][5]
    counts = [int((step["y"] > 0).sum()) for step in right]
    assert (copy["label"], copy["gate"]) == ("gate/copy", "g")
    few, many = sum(0 < count <= 51 for count in counts), sum(count > 51 for count in counts)
    assert copy["kernels"] == {"copy_few": few, "copy_many": many}
    assert copy["runs"] == few + many


def test_runner_reports_and_dumps(tmp_path):
    given = frames(6)
    check_runner(prepared(sample_network(), tmp_path, given), tmp_path, given)


def test_runner_without_frames(tmp_path):
    command = prepared(sample_network(), tmp_path, frames(1))[:3]
    done = subprocess.run([*command, "--steps", "2"], capture_output=True, text=True, timeout=60)
    report = json.loads(done.stdout)
    assert 0.3 < report["gates"]["probe.g.action"]["compute"] < 0.7


@slow_once
@pytest.mark.parametrize("target", EMULATORS)
def test_runner_on_arm(target, tmp_path):
    emulator, cpu = EMULATORS[target]
    if shutil.which(emulator) is None:
        pytest.skip(f"{emulator} is not installed (Debian's package qemu-user-static)")
    given = frames(6)
    command = prepared(sample_network(target), tmp_path, given)
    check_runner([emulator, "-cpu", cpu, *command], tmp_path, given)


@slow_once
@pytest.mark.parametrize("target", WEAKER)
def test_a_weaker_processor_is_refused(target, tmp_path):
    emulator = "qemu-x86_64-static" if target.startswith("x86") else EMULATORS[target][0]
    if shutil.which(emulator) is None:
        pytest.skip(f"{emulator} is not installed (Debian's package qemu-user-static)")
    cpu, lacking = WEAKER[target]
    command = [emulator, "-cpu", cpu, *prepared(sample_network(target), tmp_path, frames(1))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert re.search(rf"this processor lacks {lacking}, which the library was compiled for", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "runner PLAN WEIGHTS"),
        (["--frames"], "--frames needs a value"),
        (["PLAN", "WEIGHTS", "more"], "what is more?"),
        (["PLAN", "WEIGHTS", "--fast", "1"], "unknown option --fast"),
        (["PLAN", "WEIGHTS", "--steps", "0"], "--steps needs a number"),
        (["PLAN", "WEIGHTS", "--threads", "many"], "--threads needs a number"),
        (["PLAN", "WEIGHTS", "--cores", "0,"], "--cores needs core numbers"),
        (["none", "WEIGHTS"], "can't read the plan none"),
        (["PLAN", "PLAN"], "the weights are of another plan"),
        (["PLAN", "WEIGHTS", "--frames", "WEIGHTS"], "not a whole number of frames"),
        (["PLAN", "WEIGHTS", "--threads", "100"], "threads is 100"),
    ],
)
def test_wrong_use_of_the_runner(arguments, message, tmp_path):
    runner, plan, weights, *_ = prepared(sample_network(), tmp_path, frames(1))
    given = [{"PLAN": plan, "WEIGHTS": weights}.get(argument, argument) for argument in arguments]
    done = subprocess.run([runner, *given], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_runner_refuses_frames_with_nan(tmp_path):
    given = frames(2)
    given[1, 0, 5] = np.nan
    done = subprocess.run(prepared(sample_network(), tmp_path, given), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "input x has NaN or infinite values" in done.stderr


@slow_once
@pytest.mark.parametrize("target", ["x86-64-avx512", *EXAMPLE_TARGETS])
def test_the_runtime_is_small(target):
    net = sample_network(target)
    alone = [relu()]
    objects = {"relu": net.objects["relu"]}
    runner = link.link_runner(objects, link.kernel_table(alone), net.machine)
    assert len(runner) < CODE_LIMIT
    assert sum(loaded_bytes(runner)) < CODE_LIMIT
    assert loaded_bytes(link.link_library(objects, link.kernel_table(alone), net.machine))[0] < CODE_LIMIT // 3


def loaded_bytes(elf: bytes) -> tuple[int, int]:
    """Bytes in the file of (read-only, writable) loaded segments: code and constants, data."""
    is_64 = elf[4] == 2
    start, size, count = (
        (struct.unpack_from("<Q", elf, 32)[0], *struct.unpack_from("<HH", elf, 54))
        if is_64
        else (struct.unpack_from("<I", elf, 28)[0], *struct.unpack_from("<HH", elf, 42))
    )
    totals = [0, 0]
    for i in range(count):
        at = start + i * size
        kind = struct.unpack_from("<I", elf, at)[0]
        flags = struct.unpack_from("<I", elf, at + (4 if is_64 else 24))[0]
        in_file = struct.unpack_from("<Q", elf, at + 32)[0] if is_64 else struct.unpack_from("<I", elf, at + 16)[0]
        if kind == 1:
            totals[flags >> 1 & 1] += in_file
    return totals[0], totals[1]
