"""Whole networks, compiled and run on this machine, against eager PyTorch and the oracle.

Kernels are compiled once for all of them: decisions are forced through the one `forced` variant of a model, and
what is compiled lies in the user's cache afterwards.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from covering import covering
from hypothesis import given, settings
from hypothesis import strategies as st
from native_networks import (
    TOLERANCE,
    artifact,
    assert_same_steps,
    machine_for,
    own_steps,
    rounding_error,
    run_forced,
    variants,
)
from native_networks import zoo_network as zoo
from oracle_check import FRAMES, KINDS, PATTERNS, SIZES, TILED, net_of, pattern, random_decisions, traced, video

from dvexport.passes.expose_probes import decision_values
from dvexport.run.oracle import Oracle
from dvexport.targets import catalogue
from dvexport.targets.runtime import Runtime
from dvexport.targets.tvm.artifact import build_artifact

NETS = covering(product(KINDS, SIZES, ("stream", "clip")))
"""Networks whose kinds, sizes and modes meet two by two. What three of them decide together is the lowering's, which
`test_oracle` shows for all; kernels are shared by name."""
STREAMS = [(kind, size) for kind, size, mode in NETS if mode == "stream"]
SMALL = ("dstep", "uneven")
"""The one network that the fast tests compile: channels and tiles, cells that do not divide the planes."""


every_network = pytest.mark.parametrize(("kind", "size", "mode"), NETS)
every_stream = pytest.mark.parametrize(("kind", "size"), STREAMS)


@cache
def opened(kind: str, size: str, mode: str = "stream", variant: str = "forced", threads: int = 1) -> Runtime:
    frames = FRAMES if mode == "clip" else 1
    return artifact(kind, size, mode).variant(variant, frames).open(threads=threads)


def assert_eager(found: np.ndarray, expected: np.ndarray, about: str = "") -> None:
    """Equal up to rounding, frame by frame."""
    error = np.abs(found - expected).max(axis=1)
    bound = TOLERANCE * float(np.abs(expected).max())
    assert (error <= bound).all(), f"{about}: by frame {error}, more than {bound:.2g}"


def assert_follows(
    runtime: Runtime, kind: str, size: str, decisions: dict[str, np.ndarray], seed: int = 0, about: str = ""
) -> None:
    """Compare a clip under forced decisions with eager PyTorch."""
    frames = video(size, seed)
    assert_eager(run_forced(runtime, frames, decisions), net_of(kind, size).eager(frames, decisions), about)


# --- the numbers


def test_small_network():
    """What every other test here does at length: patterns in both sizes of lists, and the model's own decisions."""
    for name in ("reuse after skip", "tiles newly active under reuse", "no tile active", "all pairs of actions"):
        assert_follows(opened(*SMALL), *SMALL, pattern(*SMALL, name))
    frames = video(SMALL[1], seed=5)
    assert_same_steps(own_steps(opened(*SMALL, variant="gated"), frames), Oracle(traced(*SMALL)).run_clip(frames))


@pytest.mark.slow
@every_network
def test_patterns(kind, size, mode):
    """Every pattern, each from a reset."""
    for name in PATTERNS:
        assert_follows(opened(kind, size, mode), kind, size, pattern(kind, size, name), about=name)


@pytest.mark.slow
@every_network
def test_random_decisions(kind, size, mode):
    @settings(max_examples=12)
    @given(seed=st.integers(0, 2**16), share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    def follows(seed, share):
        assert_follows(opened(kind, size, mode), kind, size, random_decisions(kind, size, seed, share), seed % 3)

    follows()


@pytest.mark.slow
@every_network
def test_own_decisions(kind, size, mode):
    """Not forced: policies, masks and their states, islands of other operators included."""
    frames = video(size, seed=5)
    expected = Oracle(traced(kind, size)).run_clip(frames)
    assert_same_steps(own_steps(opened(kind, size, mode, "gated"), frames), expected)


@pytest.mark.slow
@every_network
def test_dense_is_everything_computed(kind, size, mode):
    runtime, frames = opened(kind, size, mode, "dense"), video(size)
    assert list(runtime.inputs) == ["frames"]
    expected = net_of(kind, size).eager(frames, pattern(kind, size, "everything computed"))
    assert_eager(run_forced(runtime, frames, {}), expected)


# --- streams and clips


@pytest.mark.slow
@every_stream
def test_a_clip_of_a_causal_model_is_its_stream(kind, size):
    """A plan of one frame is stepped through a clip of frames."""
    decisions, frames = random_decisions(kind, size, 3, 0.5), video(size)
    stepped = artifact(kind, size).variant("forced", FRAMES).open()
    assert stepped.inputs["frames"].shape[0] == FRAMES
    outputs = [stepped.run({"frames": frames, **decisions})["logits"] for _ in range(2)]
    np.testing.assert_array_equal(outputs[0], run_forced(opened(kind, size), frames, decisions))
    np.testing.assert_array_equal(*outputs)


def test_reset_forgets():
    """An odd number of steps, so that the halves of the states have changed places; then the same again."""
    runtime, decisions, frames = opened(*SMALL), random_decisions(*SMALL, 1, 0.5), video(SMALL[1])
    first = run_forced(runtime, frames, decisions)
    run_forced(runtime, frames[::-1][:3].copy(), decisions)
    np.testing.assert_array_equal(run_forced(runtime, frames, decisions), first)


def test_frames_before_matter():
    """Were states lost, a stream would give what its frames give alone."""
    runtime, decisions, frames = opened(*SMALL), pattern(*SMALL, "reuse after reuse"), video(SMALL[1])
    whole = run_forced(runtime, frames, decisions)
    alone = run_forced(runtime, frames[-1:], {name: value[-1:] for name, value in decisions.items()})
    assert np.abs(whole[-1] - alone[0]).max() > 1e-2


@pytest.mark.slow
@every_stream
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(kind, size, threads):
    decisions, frames = random_decisions(kind, size, 7, 0.6), video(size)
    one, more = (run_forced(opened(kind, size, threads=n), frames, decisions) for n in (1, threads))
    assert_eager(more, one)


# --- skipped work


def convolutions(kind: str, size: str, name: str, t: int = 0) -> list:
    """Gated convolution calls of frame `t` of a pattern."""
    frames, decisions = video(size), pattern(kind, size, name)
    runtime = artifact(kind, size).variant("forced", 1).open(profile=True)
    run_forced(runtime, frames[: t + 1], {key: value[: t + 1] for key, value in decisions.items()})
    return [call for call in runtime.end_profile()[-1] if call.gate and call.label.startswith("conv ")]


@pytest.mark.parametrize("name", ["no tile active", "no channel active"])
def test_nothing_active_runs_no_gated_convolution(name):
    calls = convolutions(*SMALL, name)
    skipped = [call for call in calls if call.kernel is None]
    assert len(calls) >= 3 * 4  # three blocks; two convolutions, and twice what the first may owe
    least = len(calls) if name == "no tile active" else len(calls) - 3  # the second convolution is no policy's
    assert len(skipped) >= least
    assert all(0 in call.counts for call in skipped)  # no row, no column or no pixel: there was nothing to compute


@pytest.mark.slow
@pytest.mark.parametrize("kind", TILED)
def test_counts_are_those_of_the_decisions(kind):
    """The lists that the kernels of a computed frame are given: every channel, and no pixel of an inactive tile."""
    full, one = (convolutions(kind, "even", name, 2) for name in ("everything computed", "one tile"))
    assert len(full) == len(one)
    for whole, part in zip(full, one, strict=True):
        rows, _, vectors = whole.counts
        if whole.kernel is None:
            continue  # owes nothing: it computed everything before
        assert rows is None or rows in (32, 48)
        if part.kernel is not None:
            assert vectors is not None
            assert 0 < part.counts[2] <= max(1, vectors // 4)


# --- the models of the zoo


def assert_oracle(name: str, mode: str, **options: object) -> None:
    torch.manual_seed(0)
    model, frames = zoo(name, mode, **options)
    made = build_artifact(variants(model, mode, len(frames), ("gated",)), machine_for(catalogue.HOST), lambda _: None)
    runtime = made.variant("gated", len(frames) if mode == "clip" else 1).open(threads=2)
    rounding = 0.0 if decision_values(model) else rounding_error(name, **options)
    tolerance = max(TOLERANCE, 4 * rounding)
    assert_same_steps(own_steps(runtime, frames), Oracle(model).run_clip(frames), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dstep_motion_d40", "dstep_motion_d60", "tsm_motion", "tsn_motion"])
def test_shipped_checkpoint(name):
    assert_oracle(name, "stream")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode", "size"),
    [
        ("dstep_resnet18", "stream", (128, 128)),
        ("adafuse_resnet18", "stream", (96, 80)),
        ("adafuse_resnet50", "stream", (96, 96)),
        ("dstep_resnet50", "stream", (96, 96)),
        ("dstep_paper_resnet18", "stream", (112, 96)),
        ("tsm_online_resnet18", "stream", (96, 96)),
        ("tsn_resnet50", "stream", (80, 96)),
        ("tsm_resnet18", "clip", (96, 96)),
        ("tsm_resnet50", "clip", (64, 64)),
        ("tsm_online_mobilenetv2", "stream", (96, 96)),
        ("tsm_mobilenetv2", "clip", (64, 64)),
    ],
)
def test_model_of_the_zoo(name, mode, size):
    """Random weights: what is tested is that every layer of the architecture is compiled to what it means."""
    assert_oracle(name, mode, frames=2 if "50" in name else 3, size=size, classes=11)
