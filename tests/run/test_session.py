"""Running bundles: streams, clips, the dense and the forced variant, and wrong input."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bundles import FRAMES, SIZE, inlined, logits, noise, small_bundle, small_model, torch_logits

from dvexport import gates
from dvexport.bundle.levels import read_gate_level
from dvexport.decisions import Action
from dvexport.errors import DeviceError, UsageError
from dvexport.run.open import open_session
from dvexport.run.oracle import Oracle
from dvexport.run.session import Session
from dvexport.targets.onnx.runtime import OrtSession
from dvexport.targets.runtime import MOST_THREADS, Port

DSTEP, TSN = "dstep_resnet18", "tsn_resnet18"


@pytest.fixture(scope="module")
def stream():
    return small_bundle(DSTEP, "stream")


def test_actions_are_those_of_the_gates():
    assert tuple(Action) == (gates.SKIP, gates.REUSE, gates.COMPUTE)


def test_stream_gives_what_pytorch_gives_frame_by_frame(stream):
    frames = noise()
    session = open_session(stream)
    got = [session.step(frames[i : i + 1]) for i in range(FRAMES)]
    np.testing.assert_allclose(logits(got), torch_logits(small_model(DSTEP), frames), atol=1e-4)
    for decision in small_model(DSTEP).decisions():
        for t in range(FRAMES):
            np.testing.assert_array_equal(got[t].decisions[decision.gate, "action"], decision.action[t])
            np.testing.assert_array_equal(got[t].decisions[decision.gate, "tiles"], decision.tiles[t])


def test_stream_outlasts_the_clip_length(stream):
    frames = noise(3 * FRAMES, seed=1)
    got = open_session(stream).run_clip(frames)
    np.testing.assert_allclose(logits(got), torch_logits(small_model(DSTEP), frames), atol=1e-4)


@pytest.mark.parametrize("steps_before", [1, 2], ids=["odd turn", "even turn"])
def test_reset_forgets_every_frame_before(stream, steps_before):
    frames = noise()
    session = open_session(stream)
    fresh = logits(session.run_clip(frames))
    session.reset()
    for i in range(steps_before):
        session.step(noise(seed=9)[i : i + 1])
    session.reset()
    again = [session.step(frames[i : i + 1]).logits for i in range(FRAMES)]
    np.testing.assert_array_equal(np.stack(again), fresh)


def test_results_stay_as_they_are_when_the_stream_goes_on(stream):
    frames = noise()
    session = open_session(stream)
    first = session.step(frames[:1])
    kept = first.logits.copy(), {key: value.copy() for key, value in first.decisions.items()}
    session.step(frames[1:2])
    np.testing.assert_array_equal(first.logits, kept[0])
    assert all(np.array_equal(value, kept[1][key]) for key, value in first.decisions.items())


@pytest.mark.slow
def test_clip_mode_gives_what_pytorch_gives():
    frames = noise(seed=2)
    got = open_session(small_bundle(DSTEP, "clip")).run_clip(frames)
    np.testing.assert_allclose(logits(got), torch_logits(small_model(DSTEP), frames), atol=1e-4)


def test_the_oracle_runs_the_gate_level_model_at_any_length(stream):
    frames = noise(3, seed=3)
    got = Oracle(read_gate_level(stream)).run_clip(frames)
    np.testing.assert_allclose(logits(got), torch_logits(small_model(DSTEP), frames), atol=1e-5)


def _all_computed(session, frames):
    full = {
        key: np.full(shape, Action.COMPUTE, np.int64) if key[1] == "action" else np.ones(shape, bool)
        for key, shape in session.decisions.items()
    }
    return [full] * frames


def test_dense_variant_is_the_model_with_everything_computed(stream):
    frames = noise(seed=4)
    dense, forced = open_session(stream, variant="dense"), open_session(stream, variant="forced")
    everything = _all_computed(forced, FRAMES)
    got = dense.run_clip(frames)
    np.testing.assert_allclose(logits(got), logits(forced.run_clip(frames, everything)), atol=1e-4)
    assert not np.allclose(logits(got), logits(open_session(stream).run_clip(frames)), atol=1e-2)
    assert got[0].decisions == {}


def test_the_dense_variant_is_the_plain_network(stream):
    """D-STEP without gates is TSN of the same weights."""
    frames = noise(seed=4)
    plain = copy.deepcopy(small_model(TSN))
    weights = small_model(DSTEP).state_dict()
    plain.load_state_dict({key: weights[key] for key in plain.state_dict()})
    want = torch_logits(plain, frames)
    np.testing.assert_allclose(logits(open_session(stream, variant="dense").run_clip(frames)), want, atol=1e-4)


def test_forcing_the_models_own_decisions_changes_nothing(stream):
    frames = noise(seed=5)
    own = open_session(stream).run_clip(frames)
    forced = open_session(stream, variant="forced").run_clip(frames, [step.decisions for step in own])
    np.testing.assert_allclose(logits(forced), logits(own), atol=1e-5)


@pytest.mark.parametrize("mode", ["stream", "clip"])
def test_random_forced_decisions_against_eager_gates(mode, monkeypatch):
    """The block's own decision is replaced on the torch side too."""
    frames, rng = noise(seed=6), np.random.default_rng(6)
    session = open_session(small_bundle(DSTEP, mode), variant="forced")
    drawn = [
        {
            key: rng.integers(0, 3, shape) if key[1] == "action" else rng.random(shape) < 0.5
            for key, shape in session.decisions.items()
        }
        for _ in range(FRAMES)
    ]

    def forced_gate(gate):
        def decide(_x, _size):
            return tuple(torch.from_numpy(np.stack([d[gate, kind] for d in drawn])) for kind in ("action", "tiles"))

        return decide

    model = small_model(DSTEP)
    for block in model.gated_blocks():
        monkeypatch.setattr(block.gates, "forward", forced_gate(block.name))
    want = torch_logits(model, frames)
    got = session.run_clip(frames, drawn)
    np.testing.assert_allclose(logits(got), want, atol=1e-4)
    assert got[2].decisions["layer1.0", "action"] is drawn[2]["layer1.0", "action"]


def _wrong_frames():
    frame = noise(1)
    broken = frame.copy()
    broken[0, 1, 2, 3] = np.nan
    return {
        "shape": (frame[:, :, :-1], "float32 of shape"),
        "no array": (frame.tolist(), "float32 of shape"),
        "type": (frame.astype(np.float64), "float64"),
        "layout": (frame.transpose(0, 2, 3, 1), "float32 of shape"),
        "two frames": (noise(2), "float32 of shape"),
        "NaN": (broken, "NaN or infinite"),
    }


@pytest.mark.parametrize("case", _wrong_frames())
def test_wrong_frames_are_refused(stream, case):
    frame, message = _wrong_frames()[case]
    with pytest.raises(UsageError, match=message):
        open_session(stream).step(frame)


def test_a_view_of_a_larger_array_is_taken_as_it_looks(stream):
    wide = np.random.default_rng(0).standard_normal((1, 3, SIZE, 2 * SIZE)).astype(np.float32)
    view = wide[..., ::2]
    np.testing.assert_array_equal(
        open_session(stream).step(view).logits, open_session(stream).step(np.ascontiguousarray(view)).logits
    )


def test_wrong_use_is_explained(stream):
    frames = noise()
    with pytest.raises(UsageError, match="only the forced variant"):
        open_session(stream).step(frames[:1], {})
    with pytest.raises(UsageError, match="did you mean dense"):
        open_session(stream, variant="dens")
    forced = open_session(stream, variant="forced")
    with pytest.raises(UsageError, match="needs the decisions"):
        forced.step(frames[:1])
    with pytest.raises(UsageError, match="missing"):
        forced.step(frames[:1], {})
    (wrong,) = _all_computed(forced, 1)
    with pytest.raises(UsageError, match=r"layer2\.1"):
        forced.step(frames[:1], {**wrong, ("layer2.1", "action"): np.full(3, 2)})
    with pytest.raises(UsageError, match="0 skip, 1 reuse or 2 compute"):
        forced.step(frames[:1], {**wrong, ("layer1.0", "action"): np.full(16, 3)})
    clip = open_session(small_bundle(DSTEP, "clip"))
    with pytest.raises(UsageError, match="whole clips"):
        clip.step(frames[:1])
    with pytest.raises(UsageError, match="of shape"):
        clip.run_clip(frames[:-1])


def test_a_closed_session_says_so(stream):
    with open_session(stream) as session:
        session.step(noise(1))
    session.close()
    for use in (lambda: session.step(noise(1)), session.reset, lambda: session.run_clip(noise(2))):
        with pytest.raises(DeviceError, match="the session is closed"):
            use()


def test_an_open_profile_leaves_no_files_behind(stream):
    runtime = OrtSession(inlined(stream), stream.manifest.states, profile=True)
    folder = Path(runtime._profile_folder.name)
    assert folder.is_dir()
    runtime.close()
    assert not folder.exists()
    with pytest.raises(DeviceError, match="the session is closed"):
        runtime.end_profile()


def test_onnx_runtime_takes_threads_up_to_a_limit(stream):
    most = max(MOST_THREADS, os.cpu_count() or 1)
    with open_session(stream, threads=most) as session:
        np.testing.assert_allclose(session.step(noise(1)).logits, open_session(stream).step(noise(1)).logits, atol=1e-5)
    for wrong in (most + 1, 0, -1, 2**32 + 2, True, 2.0, "2"):
        with pytest.raises(UsageError, match=f"threads must be a whole number from 1 to {most}, not") as caught:
            open_session(stream, threads=wrong)
        assert caught.value.why == f"this machine has {os.cpu_count()} cores: more threads only wait for them"


def test_states_are_never_copied(stream):
    """What one step writes is what the next one reads, in the same memory."""
    manifest = stream.manifest
    runtime = OrtSession(inlined(stream), manifest.states)
    runtime.run({"frames": noise(1)})
    written = runtime._buffers[1]
    assert any(np.any(array) for array in written.values())
    assert not any(np.any(array) for array in runtime._buffers[0].values())


@pytest.mark.parametrize(
    "change",
    [{"shape": (10**15,)}, {"shape": (1, 1)}, {"dtype": "int64"}, {"input": "elsewhere"}, {"output": "logits"}],
    ids=str,
)
def test_states_that_are_not_the_model_s_are_refused_before_memory_is_taken(stream, change):
    first, *others = stream.manifest.states
    states = [first.model_copy(update=change), *others]
    with pytest.raises(DeviceError, match="the list of states is not the model's"):
        OrtSession(inlined(stream), states)
    with pytest.raises(DeviceError, match="belong to two states"):
        OrtSession(inlined(stream), [first, first])


@pytest.mark.parametrize(
    ("name", "port"),
    [("frames", None), ("logits", None), ("logits", Port((), np.dtype(np.float32))),
     ("frames", Port(("n", 3, 64, 64), np.dtype(np.float32)))],
)  # fmt: skip
def test_an_artifact_without_frames_or_logits_is_one_error(name, port):
    ports = {"frames": Port((1, 3, 64, 64), np.dtype(np.float32)), "logits": Port((1, 5), np.dtype(np.float32))}
    ports = {key: port if key == name else value for key, value in ports.items() if key != name or port is not None}
    runtime = SimpleNamespace(
        inputs={key: value for key, value in ports.items() if key == "frames"},
        outputs={key: value for key, value in ports.items() if key == "logits"},
    )
    with pytest.raises(DeviceError, match=f"the artifact has no {'input' if name == 'frames' else 'output'}"):
        Session(runtime, mode="stream")
