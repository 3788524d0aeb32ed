"""What no command may do for bad input: end with a traceback or exit code 1, never end, take NaN for a number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from bundles import inlined, noise, small_bundle
from onnx import TensorProto, helper, numpy_helper

from dvexport.bundle.archive import Bundle, write_bundle
from dvexport.bundle.levels import read_gate_level
from dvexport.errors import BundleError
from dvexport.profile.run import profile
from dvexport.run.finite import first_not_finite
from dvexport.run.open import open_session
from dvexport.run.run import run

DVEXPORT = [sys.executable, "-m", "dvexport"]


@pytest.fixture(scope="module")
def stream() -> Bundle:
    return small_bundle("dstep_resnet18", "stream")


def changed(bundle: Bundle, path, name: str, change) -> Bundle:
    """The bundle with a graph changed, correctly listed."""
    files = {each: bundle.read(each) for each in bundle.manifest.files}
    model = onnx.load_model_from_string(inlined(bundle, name))
    change(model)
    return write_bundle(path, bundle.manifest, {**files, name: model.SerializeToString()})


def spoil(weight: str, value: float):
    """Return a change that sets the first number of a weight."""

    def change(model: onnx.ModelProto) -> None:
        (tensor,) = (one for one in model.graph.initializer if one.name == weight)
        array = numpy_helper.to_array(tensor).copy()
        array.flat[0] = value
        tensor.CopyFrom(numpy_helper.from_array(array, weight))

    return change


# --- files that never end


@pytest.fixture(params=["fifo", "device", "folder"])
def endless(request, tmp_path):
    path = tmp_path / "endless.toml"
    if request.param == "fifo":
        os.mkfifo(path)
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    return path


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "{}"],
        ["verify", "{}"],
        ["checkpoint", "{}"],
        ["targets", "{}"],
        ["train", "{}"],
        ["export", "tsn_resnet18", "--checkpoint", "{}", "--backend", "onnx", "-o", "o.dvx"],
        ["export", "tsn_resnet18", "--set", "labels={}", "--backend", "onnx", "-o", "o.dvx"],
        ["run", "BUNDLE", "--clip", "clip.mp4", "--inputs", "{}"],
    ],
    ids=lambda command: " ".join(command[:3]),
)
def test_what_is_no_file_is_not_read(call, stream, endless, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.format(endless).replace("BUNDLE", str(stream.path)) for word in command]
    code, _, err = call(*words)
    assert code == 2, err
    assert err.count("error:") == 1


# --- numbers


@pytest.mark.parametrize(
    "words",
    [
        ["profile", "x.dvx", "--warmup", "nan"],
        ["profile", "x.dvx", "--warmup", "inf"],
        ["profile", "x.dvx", "--runs", "999999999999"],
        ["tune", "--seconds", "nan"],
        ["train", "motion", "--epochs", "99999999999"],
        ["run", "x.dvx", "--clip", "c.mp4", "--frames", "99999999999"],
        ["export", "dstep_motion_d40", "--opset", "99", "--backend", "onnx", "-o", "o.dvx"],
    ],
)
def test_numbers_out_of_range(call, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*words)
    assert code == 2
    assert err.count("error:") == 1


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--set", "num_segments=8"], "it is called frames here: frames=8"),
        (["--set", "num_class=5"], "it is called classes here: classes=5"),
        (["--shift", "offline"], "it is an option of the model: --set shift=..."),
        (["--num_segments", "8"], "it is an option of the model: --set frames=..."),
    ],
)
def test_options_by_their_official_names(call, words, hint, tmp_path):
    code, _, err = call("export", "tsm_resnet18", *words, "--backend", "onnx", "-o", tmp_path / "o.dvx")
    assert code == 2
    assert hint in err


@pytest.mark.parametrize("name", ["arnet", "AR-Net", "va_red2", "frameexit", "dynconv", "dgnet"])
def test_models_that_are_not_there_yet(call, name, tmp_path):
    code, _, err = call("export", name, "--backend", "onnx", "-o", tmp_path / "o.dvx")
    assert code == 2
    assert "is not in this release" in err


@pytest.mark.parametrize("name", ["this:d", "sys:path", "math:pi"])
def test_what_is_no_factory(call, name, tmp_path):
    code, _, err = call("export", name, "--backend", "onnx", "-o", tmp_path / "o.dvx")
    assert code == 2
    assert f"'{name}' is no model factory" in err


# --- outputs that are no numbers


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_no_numbers_are_refused(stream, clip, tmp_path, value):
    bundle = changed(stream, tmp_path / "x.dvx", "model.onnx", spoil("fc.weight", value))
    for use in (lambda: run(bundle, clip), lambda: profile(bundle, runs=1, warmup_s=0.0)):
        with pytest.raises(BundleError, match="gives NaN or infinity, in its output 'logits'") as caught:
            use()
        assert "frame 0" in caught.value.where
        assert "the artifact is not what was exported" in caught.value.why


def test_the_first_layer_that_gives_them_is_named(stream, tmp_path):
    level = changed(stream, tmp_path / "x.dvx", "gate_level.onnx", spoil("layer3.0.downsample.0.weight", np.nan))
    place = first_not_finite(read_gate_level(level), {"frames": noise(1)})
    assert "layer3.0.downsample" in place
    assert first_not_finite(read_gate_level(stream), {"frames": noise(2)}) is None


# --- loops without an end


def add_loop(turns: str | None, *, nested: bool = False):
    """Return a change that lets the logits go through a loop."""

    def value(name, kind, shape=()):
        return helper.make_tensor_value_info(name, kind, shape)

    def loop(inside: str, outside: str, label: str, *, inner: bool) -> onnx.NodeProto:
        nodes = [helper.make_node("Identity", [f"c{label}"], [f"d{label}"])]
        if inner:
            nodes.append(loop(f"s{label}", f"t{label}", "2", inner=False))
        else:
            nodes.append(helper.make_node("Identity", [f"s{label}"], [f"t{label}"]))
        body = helper.make_graph(
            nodes,
            "body",
            [value(f"i{label}", TensorProto.INT64), value(f"c{label}", TensorProto.BOOL),
             value(f"s{label}", TensorProto.FLOAT, None)],
            [value(f"d{label}", TensorProto.BOOL), value(f"t{label}", TensorProto.FLOAT, None)],
        )  # fmt: skip
        return helper.make_node("Loop", ["turns" if turns else "", "yes", inside], [outside], body=body)

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.output[:] = ["before" if name == "logits" else name for name in node.output]
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
        if turns:
            model.graph.initializer.append(numpy_helper.from_array(np.array(int(turns)), "turns"))
        model.graph.node.append(loop("before", "logits", "1", inner=nested))

    return change


@pytest.mark.parametrize(
    ("turns", "nested", "why"),
    [
        (None, False, "has no constant number of turns"),
        ("99999999999", False, "has 99999999999 turns"),
        ("-1", False, "has -1 turns"),
        ("100000", True, "has 100000 turns, of 10 that it may have"),
    ],
)
def test_a_loop_that_may_not_end_is_refused(stream, tmp_path, turns, nested, why):
    bundle = changed(stream, tmp_path / "x.dvx", "model.onnx", add_loop(turns, nested=nested))
    with pytest.raises(BundleError, match="it has a loop that may not end") as caught:
        open_session(bundle)
    assert why in caught.value.why


def test_a_loop_that_ends_runs(stream, tmp_path):
    bundle = changed(stream, tmp_path / "x.dvx", "model.onnx", add_loop("10", nested=True))
    with open_session(bundle) as session, open_session(stream) as plain:
        np.testing.assert_array_equal(session.step(noise(1)).logits, plain.step(noise(1)).logits)


# --- the program


def test_closed_standard_output(stream):
    done = subprocess.run(
        ["/bin/sh", "-c", f"{' '.join(DVEXPORT)} inspect {stream.path} >&-"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (3, "error: standard output is closed\n")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2, 5])
def test_an_interrupt_leaves_nothing(tmp_path, seconds):
    command = [*DVEXPORT, "export", "dstep_resnet50", "--backend", "onnx", "-o", "o.dvx"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.rstrip().endswith("error: interrupted")
    assert list(tmp_path.iterdir()) == []
