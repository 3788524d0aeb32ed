"""Every legal lowering, in stream and clip mode, against eager PyTorch under the same decisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from graphs import run_steps, session
from hypothesis import given
from hypothesis import strategies as st
from oracle_check import (
    FRAMES,
    KINDS,
    PATTERNS,
    SIZES,
    Case,
    assert_agrees,
    cases,
    covering_cases,
    lowered,
    net_of,
    pattern,
    random_decisions,
    run_lowered,
    traced,
    video,
)

from dvexport.decisions import forced_name
from dvexport.graph.state import states_of
from dvexport.passes.pipeline import Request
from dvexport.targets.onnx.passes import lower

CASES = cases()
COVERING = covering_cases()
"""Every two values of kind, size, lowering, mode and compactness meet in one of these; the others are slow tests."""
GATES = 3


def every_case(wanted: Callable[[Case], bool]) -> pytest.MarkDecorator:
    """Parametrize by the cases that are `wanted`; those that are not of the covering set are slow."""
    chosen = [case for case in CASES if wanted(case)]
    marked = [case if case in COVERING else pytest.param(case, marks=pytest.mark.slow) for case in chosen]
    return pytest.mark.parametrize("case", marked, ids=str)


@every_case(lambda case: True)
def test_patterns(case):
    """Every pattern, each from a reset: one session is enough for all."""
    for name in PATTERNS:
        assert_agrees(case, pattern(case.kind, case.size, name), about=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in COVERING if c.kind != "plain_reader"], ids=str)  # AdaFuse once lowered
def test_random_decisions(case):
    @given(seed=st.integers(0, 2**16), share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    def agrees(seed, share):
        assert_agrees(case, random_decisions(case.kind, case.size, seed, share), seed % 3)

    agrees()


@every_case(lambda case: case.lowering not in ("masked", "mixed"))
def test_the_lowering_meant_is_the_one_tested(case):
    count = Counter(choice.lowering for choice in lowered(case).choices)
    # F(4,3) needs cells of 4 pixels, which only the first gate's plane has; a bottleneck's stride leaves one gate
    # without a Winograd convolution.
    least = {"winograd4": 1, "winograd2": 2}.get(case.lowering, GATES)
    assert count[case.lowering] >= least


@every_case(lambda case: case.compact and case.kind != "tiles")
def test_compact_merges_scatter_less(case):
    plane = Case(case.kind, case.size, case.lowering, case.mode)
    count = [Counter(node.op_type for node in lowered(c).model.graph.all_nodes()) for c in (case, plane)]
    assert count[0]["ScatterElements"] >= GATES > count[1]["ScatterElements"]


@every_case(lambda case: case.compact and case.mode == "stream" and case.kind == "dstep")
def test_compact_streams_are_updated_in_place(case):
    kept = {state.name for state in states_of(lowered(case).model) if state.in_place}
    assert kept == {"layer1.0.v", "layer2.0.v", "layer2.1.v"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_eager_clip_is_causal(kind, size):
    """The reference itself: a later decision or frame changes nothing before it."""
    net, frames = net_of(kind, size), video(size)
    decisions = random_decisions(kind, size, 0, 0.5)
    changed = {name: np.concatenate([value[:-1], value[:1] ^ 1]) if value.dtype == bool else value.copy()
               for name, value in decisions.items()}  # fmt: skip
    for name in changed:
        if name.endswith("action"):
            changed[name][-1] = 2 - changed[name][-1]
    later = frames.copy()
    later[-1] += 1
    before, after = net.eager(frames, decisions), net.eager(later, changed)
    np.testing.assert_array_equal(before[:-1], after[:-1])
    assert np.abs(before[-1] - after[-1]).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_decisions_matter(kind):
    """Were decisions ignored on both sides, every comparison above would hold."""
    outputs = [net_of(kind, "even").eager(video("even"), pattern(kind, "even", name)) for name in PATTERNS]
    gaps = [np.abs(a - b).max() for i, a in enumerate(outputs) for b in outputs[:i]]
    distinct = np.mean(np.array(gaps) > 0.1)
    assert distinct > 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["stream", "clip"])
def test_own_decisions(kind, size, mode):
    """Not forced: policies, masks and their states take the decisions eager PyTorch takes."""
    import torch

    frames = video(size, seed=5)
    with torch.no_grad():
        expected = net_of(kind, size)(torch.from_numpy(frames)).numpy()
    model = lower(traced(kind, size), Request(mode=mode, frames=FRAMES), check=True).model
    if mode == "stream":
        found = run_steps(model, {"frames": frames})["logits"]
    else:
        found = session(model).run(["logits"], {"frames": frames})[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_stream_is_clip(kind, size):
    decisions = random_decisions(kind, size, 3, 0.5)
    feeds = {"frames": video(size), **decisions}
    lowering = "masked" if kind in ("adafuse", "plain_reader") else "tiles"
    outputs = [run_lowered(Case(kind, size, lowering, mode), feeds) for mode in ("stream", "clip")]
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-5 * max(1.0, np.abs(outputs[0]).max()))


def test_reset_forgets():
    """A second clip from zero states is the first again: nothing is kept outside the states."""
    case = Case("dstep", "even", "tiles", "stream")
    feeds = {"frames": video("even"), **random_decisions("dstep", "even", 1, 0.5)}
    np.testing.assert_array_equal(run_lowered(case, feeds), run_lowered(case, feeds))


def test_forced_names_are_the_inputs():
    inputs = {value.name for value in lowered(Case("dstep", "even", "tiles", "stream")).model.graph.inputs}
    assert {forced_name("layer1.0", "action"), forced_name("layer2.1", "tiles"), "frames"} <= inputs
