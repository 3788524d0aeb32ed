"""The C runtime through Python: numbers, states, choices, threads, wrong use, damaged files."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import struct
import tempfile
import zlib

import numpy as np
import pytest
from native_harness import aligned, host_machine
from runtime_plans import (
    CHANNELS,
    MOST_THREADS,
    Network,
    assert_expected,
    fixed,
    frames,
    network,
    sample_kernels,
    sample_network,
    sample_plan,
)

from dvexport.errors import DeviceError, UsageError
from dvexport.targets.tvm.plan import Place, Space
from dvexport.targets.tvm.plan_file import HEADER_BYTES, VERSION
from dvexport.targets.tvm.session import NativeSession


def opened(net: Network, **options) -> NativeSession:
    return NativeSession(net.library, net.plan, net.weights, **options)


def run(session: NativeSession, given: np.ndarray) -> list[dict[str, np.ndarray]]:
    return [session.run({"x": frame}) for frame in given]


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
        assert by_label["layer1/relu"] == 3  # their cost is unknown


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
        ({"threads": MOST_THREADS + 1}, "threads must be a whole number from 1 to 8, not 9"),
        ({"threads": 0}, "from 1 to 8, not 0"),
        ({"threads": -1}, "from 1 to 8, not -1"),
        ({"threads": 2**32 + 2}, "not 4294967298"),
        ({"threads": 10**5000}, "not a number of 16610 bits"),
        ({"threads": True}, "not True"),
        ({"threads": 2.0}, "not 2.0"),
        ({"threads": "2"}, "not '2'"),
        ({"threads": 2, "cores": [0]}, "the number of cores must be a whole number from 2 to 1024, not 1"),
        ({"cores": [0] * 1025}, "the number of cores must be a whole number from 1 to 1024, not 1025"),
        ({"cores": [-1]}, "a core's number must be a whole number from 0 to 1023, not -1"),
        ({"cores": [1024]}, "from 0 to 1023, not 1024"),
        ({"cores": [2**32]}, "from 0 to 1023, not 4294967296"),
        ({"cores": [0.0]}, "from 0 to 1023, not 0.0"),
        ({"cores": [False]}, "from 0 to 1023, not False"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UsageError, match=message):
        opened(sample_network(), **options)


def test_numbers_of_numpy_are_numbers():
    with opened(sample_network(), threads=np.int64(2), cores=np.arange(2), profile=2**40) as session:
        assert (session.info.threads, session.max_threads) == (2, MOST_THREADS)
        session.run({"x": frames(1)[0]})
        assert session.call_times()


def test_a_library_for_another_machine():
    with pytest.raises(DeviceError, match="can't be loaded on this machine"):
        NativeSession(b"\x7fELF" + bytes(100), b"", b"")


def test_a_temporary_folder_that_libraries_can_t_run_from(small_disk, monkeypatch):
    disk, net = small_disk("size=64m", "noexec"), sample_network()
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    with pytest.raises(DeviceError, match="can't be loaded on this machine") as caught:
        opened(net)
    assert caught.value.where == str(disk)
    assert caught.value.why == "programs may not run from the folder of temporary files"
    assert "TMPDIR" in caught.value.hint


def test_a_temporary_folder_that_is_full(small_disk, monkeypatch):
    disk, net = small_disk(), sample_network()
    (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 8192))
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    with pytest.raises(DeviceError, match="can't be written to a temporary file") as caught:
        opened(net)
    assert caught.value.why == "No space left on device"
    assert [path.name for path in disk.iterdir()] == ["filler"]


# --- damaged files

HEADER, PORT, CALL = HEADER_BYTES, 80, 64
PORTS = len(sample_plan().inputs) + len(sample_plan().outputs)
CALLS_AT = HEADER + PORTS * PORT
VARIANTS_AT = CALLS_AT + len(sample_plan().calls) * CALL
ARGUMENTS_AT = VARIANTS_AT + 56 * sum(len(call.alternatives) for call in sample_plan().calls)


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
    "newer": (_set(8, "<I", VERSION + 1), f"format version {VERSION + 1}, this dvexport reads version {VERSION}"),
    "older": (_set(8, "<I", VERSION - 1), "export it again"),
    "checksum": (lambda plan: plan[:200] + bytes([plan[200] ^ 1]) + plan[201:], "its checksum is wrong"),
    "another library": (_set(72, "<I", 1), "the plan is for another library"),
    "no thread": (_set(132, "<I", 0), "it is laid out for 0 threads, which are 1 to 32"),
    "too many threads": (_set(132, "<I", 33), "it is laid out for 33 threads, which are 1 to 32"),
    "counts": (_set(108, "<I", 4000), "its tables do not fill the file"),
    "huge arena": (_set(48, "<Q", 1 << 60), "needs more memory than there can be"),
    "large arena": (_set(48, "<Q", 1 << 50), "MiB of memory for the network are more than this device has"),
    "small arena": (_set(48, "<Q", 64), "lies outside its memory space"),
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
    "no space": (_set(HEADER + 16, "<Q", 6 << 56), "port 0 is in no memory space"),
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
    "size": (_set(ARGUMENTS_AT + 8, "<Q", 64), "variant 0: buffer 0 of relu is too small"),
    "half a float": (_set(ARGUMENTS_AT, "<Q", 1 << 56 | 4), "variant 0: buffer 0 of relu is not aligned"),
    "extent": (_set(ARGUMENTS_AT + 16, "<Q", 1 << 56), "variant 0: buffer 1 of relu is no constant"),
    "written weights": (_set(ARGUMENTS_AT + 32, "<QQ", 0, 64), "variant 0: buffer 2 of relu is written and lies in"),
    "half over": (_set(ARGUMENTS_AT + 32, "<Q", 1 << 56 | 64), "buffer 2 of relu is written and overlaps another"),
    "list": (_set(ARGUMENTS_AT + 21 * 16, "<Q", 1 << 56), "buffer 1 of copy_few is a list that nothing has written"),
    "endless strings": (lambda plan: fixed(plan[:-1] + b"x"), "its strings do not end"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_plan_is_refused(kind):
    change, message = DAMAGE[kind]
    net = sample_network()
    with pytest.raises(DeviceError) as caught:
        NativeSession(net.library, change(net.plan), net.weights)
    assert message in str(caught.value)


def test_two_outputs_of_one_name_are_refused():
    """The place of the first would be read with the size of the second."""
    plan = sample_plan()
    plan.outputs = [plan.outputs[0], dataclasses.replace(plan.outputs[1], name=plan.outputs[0].name)]
    net = network(plan, sample_kernels(), sample_network().weights, host_machine())
    with pytest.raises(DeviceError, match="two outputs have one name"):
        opened(net)


def test_an_input_may_not_lie_in_the_weights():
    plan = sample_plan()
    place = Place(Space.WEIGHTS, 0, 4 * CHANNELS)
    plan.inputs = [dataclasses.replace(plan.inputs[0], place=place)]
    net = network(plan, sample_kernels(), bytes(4 * CHANNELS), host_machine())
    with pytest.raises(DeviceError, match="input 0 lies in the weights"):
        opened(net)


@pytest.mark.parametrize(
    ("count", "message"), [(201, "is too small"), (-1, "has a negative entry"), (1 << 30, "small")]
)
def test_an_extent_that_its_buffers_do_not_hold_is_refused(count, message):
    """Weights that the plan is for, with another number of channels in them than its places are for."""
    net = sample_network()
    weights = struct.pack("<i", count) + net.weights[4:]
    plan = bytearray(net.plan)
    plan[28:32] = struct.pack("<I", zlib.crc32(weights))
    with pytest.raises(DeviceError, match=message):
        NativeSession(net.library, bytes(plan), weights)


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
