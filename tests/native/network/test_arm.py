"""Compiled networks on ARM under emulation: the same numbers and decisions as on this machine, on the oldest processor
that they are for; and gates that save instructions there too.

It proves instruction sets, ABI, C library and numbers, never speed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest
from covering import covering
from emulated import count_instructions, emulator, run_emulated
from native_networks import artifact, machine_for, run_forced, variants, zoo_network
from oracle_check import net_of, pattern, random_decisions, video
from runtime_plans import frames as sample_frames
from runtime_plans import sample_network, write_runner

from dvexport.dialect.flops import flop_table
from dvexport.run.session import steps_of
from dvexport.targets import catalogue
from dvexport.targets.tvm.artifact import NativeArtifact, build_artifact
from dvexport.targets.tvm.calls.draft import ALGORITHMS

pytestmark = pytest.mark.slow

LOGITS = 1e-4
"""Largest difference from this machine's logits, as a share of the largest."""

PROCESSORS = {
    "raspberry-pi-4": ("aarch64", "cortex-a72"),
    "raspberry-pi-5": ("aarch64", "cortex-a76"),
    "arm64": ("aarch64", "cortex-a53"),
    "rv1126": ("arm", "cortex-a7"),
}
FRAMES = 3


def command(target: str, cpu: str = "", *, plugins: bool = False) -> list[str]:
    """The emulator of a target's processor, or of another of the kind."""
    architecture, own = PROCESSORS[target]
    return [emulator(architecture, plugins=plugins), "-cpu", cpu or own]


Ports = tuple[list[str], Mapping[str, object]]


def ports_of(made: NativeArtifact, variant: str) -> Ports:
    """Names of the inputs and the outputs of a variant, from this machine's library."""
    with made.variant(variant, 1).open() as session:
        return list(session.inputs), dict(session.outputs)


def assert_close(found: np.ndarray, expected: np.ndarray, share: float = LOGITS) -> None:
    assert np.abs(found - expected).max() <= share * np.abs(expected).max()


# --- kernels, through small networks


SMALL = [
    ("raspberry-pi-4", "dstep", "even"), ("raspberry-pi-4", "dstep", "uneven"),
    ("raspberry-pi-4", "bottleneck", "even"), ("raspberry-pi-4", "adafuse", "uneven"),
    ("raspberry-pi-4", "tiles", "even"), ("rv1126", "dstep", "even"), ("rv1126", "bottleneck", "uneven"),
]  # fmt: skip
"""Target, kind and size."""
DECISIONS = ("all pairs of actions", "tiles newly active under reuse", "random")
CASES = covering([(*network, name) for network in SMALL for name in DECISIONS])


def test_every_network_is_emulated():
    assert {case[:3] for case in CASES} == set(SMALL)


@pytest.mark.parametrize(("target", "kind", "size", "name"), CASES)
def test_small_network(target, kind, size, name):
    """Forced decisions, so that lists of all lengths occur; the model's own are in every output beside."""
    emulated, frames = command(target), video(size)[:FRAMES]
    drawn = random_decisions(kind, size, 11, 0.4) if name == "random" else pattern(kind, size, name)
    decisions = {key: value[:FRAMES] for key, value in drawn.items()}
    inputs, outputs = ports_of(artifact(kind, size), "forced")
    made = artifact(kind, size, target=target)
    found = run_emulated(made, "forced", {"frames": frames, **decisions}, (inputs, outputs), emulated)
    with artifact(kind, size).variant("forced", 1).open() as session:
        expected = run_forced(session, frames, decisions)
    assert_close(found["logits"], expected, 1e-5)
    assert_close(found["logits"], net_of(kind, size).eager(frames, decisions), 1e-5)


@pytest.mark.parametrize(("cpu", "threads"), [("cortex-a53", 1), ("cortex-a76", 1), ("cortex-a72", 3)])
def test_other_processors_and_threads(cpu, threads):
    """What is compiled for a Cortex-A72 runs on the smaller and the later core, and on several."""
    kind, size = "dstep", "even"
    frames, decisions = video(size), random_decisions(kind, size, 5, 0.5)
    made, ports = artifact(kind, size, target="raspberry-pi-4"), ports_of(artifact(kind, size), "forced")
    emulated = command("raspberry-pi-4", cpu)
    found = run_emulated(made, "forced", {"frames": frames, **decisions}, ports, emulated, threads)
    assert_close(found["logits"], net_of(kind, size).eager(frames, decisions), 1e-5)


# --- the processor is what it is said to be


_DOT = """
void _start(void) {
    __asm__ volatile("sdot v0.4s, v1.16b, v2.16b\\n mov x0, #0\\n mov x8, #93\\n svc #0");
}
"""
"""Multiplies bytes with an instruction of later processors, and exits."""


def test_the_emulated_processor_lacks_what_it_lacks(tmp_path):
    """Were this not so, nothing here would prove that an artifact's instructions are all there."""
    source, program = tmp_path / "dot.c", tmp_path / "dot"
    source.write_text(_DOT)  # no C library: it would be compiled for the processor first
    target = ["-target", "aarch64-linux-none", "-mcpu=cortex_a76", "-nostdlib", "-static"]
    subprocess.run([sys.executable, "-m", "ziglang", "cc", *target, str(source), "-o", str(program)], check=True)
    codes = {cpu: subprocess.run([*command("raspberry-pi-4", cpu), str(program)], check=False).returncode
             for cpu in ("cortex-a72", "cortex-a76")}  # fmt: skip
    assert codes["cortex-a76"] == 0
    assert codes["cortex-a72"] in (-signal.SIGILL, 128 + signal.SIGILL)


@pytest.mark.parametrize(("target", "weaker", "lacking"), [
    ("raspberry-pi-5", "cortex-a72", "lse|dotprod"), ("raspberry-pi-5", "cortex-a53", "lse|dotprod"),
])  # fmt: skip
def test_code_for_a_later_processor_is_refused(target, weaker, lacking, tmp_path):
    """By an error when the network is opened, and not by an illegal instruction in a step."""
    program = write_runner(sample_network(target), tmp_path, sample_frames(1))
    assert subprocess.run([*command(target), *program], capture_output=True, check=False).returncode == 0
    done = subprocess.run([*command(target, weaker), *program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "this processor lacks" in done.stderr
    assert any(name in done.stderr for name in lacking.split("|"))


# --- a whole shipped model


@cache
def shipped(target: str, algorithms: tuple[str, ...] = ALGORITHMS) -> tuple[NativeArtifact, np.ndarray]:
    """The gated and the dense variant of the shipped D-STEP model, and a few frames."""
    model, frames = zoo_network("dstep_motion_d40", "stream")
    models = variants(model, "stream", len(frames), ("gated", "dense"))
    return build_artifact(models, machine_for(target), lambda _: None, algorithms), frames[:4]


@pytest.mark.parametrize("target", ["raspberry-pi-4", "rv1126"])
def test_shipped_model(target):
    here, frames = shipped(catalogue.HOST)
    made, ports = shipped(target)[0], ports_of(here, "gated")
    found = run_emulated(made, "gated", {"frames": frames[:3]}, ports, command(target))
    with here.variant("gated", 1).open() as session:
        steps = [steps_of(session.run({"frames": frame[None]}), 0)[0] for frame in frames[:3]]
    assert_close(found["logits"], np.stack([step.logits for step in steps]))
    for t, step in enumerate(steps):
        for (gate, kind), value in step.decisions.items():
            assert np.array_equal(found[f"probe.{gate}.{kind}"][t], value), (t, gate, kind)


@pytest.mark.parametrize("algorithms", [("direct",), ALGORITHMS], ids="+".join)
def test_gates_save_instructions(algorithms, record_property):
    """The shipped model's steps execute fewer instructions than its dense ones, beside the share of MACs asked for.

    With one algorithm for both, instructions follow the share. With Winograd's the dense model takes fewer too, as it
    can take whole images in the largest tiles.
    """
    target, steps = "raspberry-pi-4", (2, 4)
    emulated = command(target, plugins=True)
    made, frames = shipped(target, algorithms)
    counted = {
        variant: count_instructions(made, variant, {"frames": frames}, ["frames"], emulated, steps)
        for variant in ("dense", "gated")
    }
    with shipped(catalogue.HOST)[0].variant("gated", 1).open() as session:
        decisions = [steps_of(session.run({"frames": frame[None]}), 0)[0].decisions for frame in frames]
    table = flop_table(zoo_network("dstep_motion_d40", "stream")[0])
    dense_macs = table.dense * (steps[1] - steps[0])
    flops = sum(table.executed(decisions).frames[steps[0] : steps[1]]) / dense_macs
    share, per_mac = counted["gated"] / counted["dense"], counted["dense"] / dense_macs
    measured = {"instructions, gated of dense": share, "MACs, gated of dense": flops, "instructions a MAC": per_mac}
    for name, value in {**counted, **measured}.items():
        record_property(name, value)
    assert flops < 0.6
    if algorithms == ("direct",):
        assert share < 1.15 * flops
        assert per_mac < 0.5  # four to an instruction, and at most as many others
    else:
        assert share < 0.75
        assert per_mac < 0.25
