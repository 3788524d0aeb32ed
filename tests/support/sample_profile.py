"""A profile made up, of a D-STEP ResNet-18 on a Raspberry Pi 4: for tests of what is told of one."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from dvexport.profile.report_text import print_result
from dvexport.profile.result import (
    ClipInfo,
    DeviceInfo,
    GateStats,
    GateStep,
    Method,
    MinMeanMax,
    NodeTime,
    ProfileResult,
    StepStats,
    StepTimes,
)

FRAMES, GRID, STEM_MACS = 16, 7, 150_000_000
GATE_MACS = 200_000_000
NAMES = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]


def _decide(rng: np.random.Generator, channels: int, frame: int) -> GateStep:
    """A blob that moves over the grid, most channels computed, some reused."""
    rows, columns = np.mgrid[:GRID, :GRID]
    centre = 1 + 4.5 * frame / FRAMES
    radius = rng.uniform(1.6, 3.2)
    mask = (np.hypot(rows - 3.4, columns - centre) < radius).astype(int)
    compute = int(rng.binomial(channels, 0.55))
    reuse = int(rng.binomial(channels - compute, 0.6)) if frame else 0
    return GateStep(
        skip=channels - compute - reuse,
        reuse=reuse,
        compute=compute,
        tiles_active=int(mask.sum()),
        tiles_total=GRID * GRID,
        tile_mask=mask.tolist(),
    )


def _executed(step: GateStep) -> int:
    return int(GATE_MACS * step.compute_share * step.tile_share)


def _nodes(rng: np.random.Generator) -> list[NodeTime]:
    nodes, clock = [NodeTime("stem/Conv", "Conv", None, 900.0, 0.0, 905.0)], 905.0
    for gate in NAMES:
        for op, us in (("Gemm", 60), ("NonZero", 25), ("GatherND", 110), ("Conv", 520), ("ScatterND", 130)):
            took = us * rng.uniform(0.9, 1.1)
            nodes.append(NodeTime(f"{gate}/{op}", op, gate, float(us), clock, took, decides=op == "Gemm"))
            clock += took
    return nodes


def make_result(seed: int = 0, repeats: int = 20) -> ProfileResult:
    rng = np.random.default_rng(seed)
    channels = {name: 64 * 2 ** (int(name[5]) - 1) for name in NAMES}
    steps, gated = [], []
    for frame in range(FRAMES):
        taken = {name: _decide(rng, channels[name], frame) for name in NAMES}
        executed = STEM_MACS + sum(_executed(step) for step in taken.values())
        samples = (4.5 + 9 * executed / 1.75e9) * rng.normal(1, 0.02, repeats)
        gated += samples.tolist()
        steps.append(
            StepStats(
                frame,
                float(np.median(samples)),
                executed,
                STEM_MACS + len(NAMES) * GATE_MACS,
                taken,
                "moving something left to right",
                0.35 + 0.03 * frame,
            )
        )
    gates = [
        GateStats(
            name,
            "tiles",
            f"0.{i}5 of dense at 40 % of the tiles",
            channels[name],
            (GRID, GRID),
            MinMeanMax.of([_executed(step.gates[name]) / 1e9 for step in steps]),
            GATE_MACS / 1e9,
            0.845 if name != "layer4.1" else 1.71,
            1.45,
        )
        for i, name in enumerate(NAMES)
    ]
    return ProfileResult(
        model="dstep-resnet18",
        target="raspberry-pi-4",
        backend="onnx",
        mode="stream",
        clip=ClipInfo("moving_left.mp4", FRAMES, 12.0),
        device=DeviceInfo("Cortex-A72", 4, 2, "onnxruntime", "1.24.0", "Linux 6.6", "performance", [1800.0] * 4, 52.4),
        method=Method(10, repeats),
        forced=None,
        gated=StepTimes(gated),
        dense=StepTimes(rng.normal(13.6, 0.2, FRAMES * repeats).tolist()),
        steps=steps,
        gates=gates,
        nodes=_nodes(rng),
    )


def make_frames(side: int = 112) -> np.ndarray:
    rows, columns = np.mgrid[:side, :side]
    ground = 90 + 50 * np.sin(columns / 9) * np.cos(rows / 13)
    frames = np.repeat(ground[None, :, :, None], FRAMES, 0).repeat(3, 3) * [0.9, 1.0, 0.8]
    for frame in range(FRAMES):
        centre = side * (1.5 + 4.5 * frame / FRAMES) / GRID
        frames[frame, np.hypot(rows - side * 0.55, columns - centre) < side * 0.13] = [235, 190, 90]
    return frames.clip(0, 255).astype(np.uint8)


def result_table(result: ProfileResult) -> str:
    """Return what `print_result` prints, as plain text."""
    text = io.StringIO()
    print_result(result, Console(file=text))
    return text.getvalue()
