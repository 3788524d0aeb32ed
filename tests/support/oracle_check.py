"""Small gated models whose decisions can be forced, and the comparison of their lowerings with eager PyTorch.

Every model is a stem and three gated residual blocks. The output of a frame is its last plane, pixel by pixel, beside a
linear read-out of the plane's mean. So an error of one pixel is not averaged away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
import torch.nn.functional as F
from covering import covering
from graphs import session
from torch import Tensor, nn

from dvexport import gates
from dvexport.decisions import forced_name
from dvexport.graph.state import states_of
from dvexport.passes import update_in_place
from dvexport.passes.group_channels import ChannelStatistics
from dvexport.passes.pipeline import Lowered, Request
from dvexport.passes.tiles import lower_tiles
from dvexport.targets.onnx.emit import emit
from dvexport.targets.onnx.passes import lower
from dvexport.targets.onnx.runtime import OrtSession
from dvexport.trace import trace

__all__ = [
    "FRAMES",
    "KINDS",
    "PATTERNS",
    "SIZES",
    "Case",
    "Net",
    "assert_agrees",
    "cases",
    "covering_cases",
    "lowered",
    "net_of",
    "pattern",
    "random_decisions",
    "run_lowered",
    "traced",
    "video",
]

FRAMES = 6
HIDDEN = 48
"""Channels of a block's first gate: enough for three groups."""
SIZES = {"even": (32, 32), "uneven": (26, 22)}
"""Planes of 16x16 and 8x8 with grids of 4x4, and of 13x11 and 7x6 with grids of 4x3."""
TILED = ("dstep", "tiles", "bottleneck", "chained")
KINDS = ("dstep", "adafuse", "tiles", "bottleneck", "plain_reader", "chained")

Decisions = dict[str, np.ndarray]
"""Forced inputs of a clip by name: `[T, C]` actions, `[T, gh, gw]` tiles."""


class Block(nn.Module):
    """3x3, 3x3; or 1x1, 3x3 with the stride, 1x1. The gate's actions are on the first convolution.

    In a `chained` block the second convolution is a gate of its own, with actions on what the sum reads, and
    reads only the channels that the first gate did not skip.
    """

    def __init__(self, name: str, kind: str, inputs: int, outputs: int, stride: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.name, self.kind = name, kind
        kernels = (1, 3, 1) if kind == "bottleneck" else (3, 3)
        strides = (1, stride, 1) if kind == "bottleneck" else (stride, 1)
        widths = (inputs, *[HIDDEN] * (len(kernels) - 1), outputs)
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], k, strides[i], k // 2, bias=False) for i, k in enumerate(kernels)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.down = nn.Conv2d(inputs, outputs, 1, stride) if (stride, inputs) != (1, outputs) else None
        self.size = tuple((side - 1) // stride + 1 for side in size)
        self.grid = (4, 4 if self.size[1] % 4 == 0 else 3)
        self.acts, self.tiled = kind != "tiles", kind in TILED
        self.gates = {name: HIDDEN} | ({f"{name}.second": outputs} if kind == "chained" else {})
        if self.acts:
            self.policies = nn.ModuleList(nn.Linear(2 * inputs, 3 * channels) for channels in self.gates.values())
        if self.tiled:
            self.mask = nn.Conv2d(inputs, 1, 3, padding=1)
        self.forced: dict[str, Tensor] = {}

    def decide(self, x: Tensor) -> dict[str, Tensor]:
        """Take the decisions from x, as a trace must; `forced` replaces them."""
        found = {}
        if self.acts:
            mean = x.mean((2, 3))
            seen = torch.cat([gates.delay(mean, name=f"{self.name}.policy"), mean], 1)
            for (gate, channels), policy in zip(self.gates.items(), self.policies, strict=True):
                found[forced_name(gate, "action")] = policy(seen).reshape(-1, channels, 3).argmax(-1)
        if self.tiled:
            rows, columns = (gates_index(size, cells) for size, cells in zip(x.shape[2:], self.grid, strict=True))
            tiles = self.mask(x.index_select(2, rows).index_select(3, columns))[:, 0] >= 0
            found |= {forced_name(gate, "tiles"): tiles for gate in self.gates}
        return found

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.forced or self.decide(x)
        names = list(self.gates) if self.kind == "chained" else [self.name] * len(self.convs)
        actions = [chosen.get(forced_name(gate, "action")) for gate in self.gates]
        u, last = x, len(self.convs) - 1
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if self.kind == "plain_reader" and i == last:
                u = norm(conv(u))  # `propagate_inactive` finds out that it reads a gate
                continue
            u = gates.gated_conv(
                u, conv, norm, gate=names[i], activation="none" if i == last else "relu",
                action=actions[i] if i < len(actions) else None,
                tiles=chosen.get(forced_name(names[i], "tiles")), active_in=actions[0] if i == 1 else None,
            )  # fmt: skip
        identity = x if self.down is None else self.down(x)
        return F.relu(identity + u if self.kind == "chained" else u + identity)


def gates_index(size: int, cells: int) -> Tensor:
    """One pixel of each cell."""
    return torch.arange(cells) * size // cells


class Net(nn.Module):
    """Stem, three blocks (the second halves the plane), outputs as the module says."""

    def __init__(self, kind: str, size: tuple[int, int]) -> None:
        super().__init__()
        plane = tuple((side - 1) // 2 + 1 for side in size)
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.blocks = nn.Sequential(
            Block("layer1.0", kind, 16, 32, 1, plane),
            Block("layer2.0", kind, 32, 32, 2, plane),
            Block("layer2.1", kind, 32, 32, 1, tuple((side - 1) // 2 + 1 for side in plane)),
        )
        self.fc = nn.Linear(32, 8)

    def forward(self, frames: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(frames)))
        return gates.frame_mean(torch.cat([x.flatten(1), self.fc(x.mean((2, 3)))], 1))

    def eager(self, frames: np.ndarray, decisions: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run a clip under forced decisions."""
        for block in self.blocks:
            kinds = ["action"] * block.acts + ["tiles"] * block.tiled
            names = [forced_name(gate, kind) for gate in block.gates for kind in kinds]
            block.forced = {name: torch.from_numpy(decisions[name]) for name in names}
        try:
            with torch.no_grad():
                return self(torch.from_numpy(frames)).numpy()
        finally:
            for block in self.blocks:
                block.forced = {}


@cache
def net_of(kind: str, size: str) -> Net:
    """A model with weights and statistics that keep every path alive."""
    torch.manual_seed(0)
    net = Net(kind, SIZES[size]).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return net


@cache
def traced(kind: str, size: str) -> ir.Model:
    return trace(net_of(kind, size), SIZES[size])


@dataclass(frozen=True)
class Case:
    """A model of `KINDS` at a size of `SIZES`, and how it is lowered.

    `lowering` is one of `LOWERINGS`, or `mixed`: one a gate. `compact` keeps merged activations compact and updates
    states in place, which planes of this size are otherwise too small for.
    """

    kind: str
    size: str
    lowering: str
    mode: str
    compact: bool = False

    def __str__(self) -> str:
        return "-".join([self.kind, self.size, self.lowering, self.mode] + ["compact"] * self.compact)

    @property
    def columns(self) -> tuple[str, str, str, str, bool]:
        """What cases differ in."""
        return self.kind, self.size, self.lowering, self.mode, self.compact

    @property
    def overrides(self) -> dict[str, str]:
        """The lowering by gate."""
        if self.lowering == "mixed":
            chain = {"layer1.0.second": "groups", "layer2.0.second": "channels", "layer2.1.second": "tiles"}
            names = {"layer1.0": "tiles", "layer2.0": "groups", "layer2.1": "channels"}
            return names | (chain if self.kind == "chained" else {})
        return {"*": self.lowering}


def cases() -> list[Case]:
    """Every kind and size in both modes, under every lowering that some gate of it allows."""
    found = []
    for kind in KINDS:
        tiled, acts = kind in TILED, kind != "tiles"
        for size in SIZES:
            by_tile = ["tiles", "winograd4", "winograd2"] if size == "even" else ["tiles"]
            by_tile = by_tile if tiled else []
            by_channel = ["channels", "groups", *["mixed"] * tiled] if acts else []
            for mode, names in (("stream", ["masked", *by_tile, *by_channel]), ("clip", ["masked", *by_tile])):
                found += [Case(kind, size, name, mode) for name in names]
                if kind != "chained":  # its merged activation is a state too, which needs the whole plane
                    found += [Case(kind, size, name, mode, compact=True) for name in by_tile]
    return found


def covering_cases() -> list[Case]:
    """Those of `cases` that have every pair of kind, size, lowering, mode and compactness."""
    return covering(cases(), lambda case: case.columns)


def statistics_of(kind: str, size: str) -> dict[str, ChannelStatistics]:
    """Calibration that makes `group_channels` permute: a third always computed, a third never."""
    found = {}
    for gate, channels in (item for block in net_of(kind, size).blocks for item in block.gates.items()):
        seen = np.random.default_rng(len(found)).integers(0, 3, (9, channels))
        seen[:, ::3], seen[:, 1::3] = 2, 0
        found[gate] = ChannelStatistics(seen)
    return found


@cache
def lowered(case: Case) -> Lowered:
    """Lower with forced decisions; gates that can't be lowered so take what they can."""
    plan = Request(
        mode=case.mode,
        frames=FRAMES,
        forced=True,
        overrides=case.overrides,
        statistics=statistics_of(case.kind, case.size),
    )
    with ExitStack() as stack:
        if case.compact:
            stack.enter_context(patch.object(lower_tiles, "_COMPACT_FROM", 0))
            stack.enter_context(patch.object(update_in_place, "_LARGE", 0))
        return lower(traced(case.kind, case.size), plan, check=True)


@cache
def _session(case: Case) -> onnxruntime.InferenceSession:
    return session(lowered(case).model, optimised=True)


@cache
def _stream(case: Case) -> OrtSession:
    model = lowered(case).model
    return OrtSession(emit(model), states_of(model))


def video(size: str, seed: int = 0) -> np.ndarray:
    """Frames of noise, `[T, 3, H, W]`."""
    return np.random.default_rng(seed).standard_normal((FRAMES, 3, *SIZES[size])).astype(np.float32)


def run_lowered(case: Case, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Run a clip, or a stream from reset; logits `[T, K]`."""
    if case.mode == "clip":
        return _session(case).run(["logits"], feeds)[0]
    stream = _stream(case)
    stream.reset()
    steps = [{name: value[t : t + 1] for name, value in feeds.items()} for t in range(FRAMES)]
    return np.concatenate([stream.run(step)["logits"] for step in steps])


_EAGER: dict[tuple[str, str, int, bytes], np.ndarray] = {}


def _expected(kind: str, size: str, seed: int, decisions: Decisions) -> np.ndarray:
    """Run eager PyTorch; once for all lowerings that are given the same."""
    key = (kind, size, seed, b"".join(value.tobytes() for value in decisions.values()))
    if key not in _EAGER:
        _EAGER[key] = net_of(kind, size).eager(video(size, seed), decisions)
    return _EAGER[key]


def assert_agrees(case: Case, decisions: Decisions, seed: int = 0, about: str = "drawn") -> None:
    """Compare a lowering with eager PyTorch under the same decisions, told `about`: 1e-5 of the largest value."""
    frames = video(case.size, seed)
    expected = _expected(case.kind, case.size, seed, decisions)
    found = run_lowered(case, {"frames": frames, **decisions})
    assert found.shape == expected.shape
    error = np.abs(found - expected).max(axis=1)
    bound = 1e-5 * max(1.0, float(np.abs(expected).max()))
    assert (error <= bound).all(), f"{case}, {about}: by frame {error}, more than {bound:.2g}"


@dataclass(frozen=True)
class Gate:
    """What a pattern needs to know of a gate."""

    index: int
    grid: tuple[int, int]
    channels: int


def _of_gates(
    kind: str, size: str, action: Callable[[Gate, int], np.ndarray], tiles: Callable[[Gate, int], np.ndarray]
) -> Decisions:
    decisions = {}
    for index, block in enumerate(net_of(kind, size).blocks):
        # The gates of a block share its tile mask, and so must what is forced on them.
        mask = [np.broadcast_to(tiles(Gate(index, block.grid, HIDDEN), t), block.grid) for t in range(FRAMES)]
        for gate, channels in block.gates.items():
            seen = Gate(index, block.grid, channels)
            if block.acts:
                rows = [np.broadcast_to(action(seen, t), channels) for t in range(FRAMES)]
                decisions[forced_name(gate, "action")] = np.stack(rows).astype(np.int64)
            if block.tiled:
                decisions[forced_name(gate, "tiles")] = np.stack(mask).astype(bool)
    return decisions


def _series(*actions: int) -> Callable[[Gate, int], np.ndarray]:
    return lambda gate, t: np.array(actions[t])


def _everywhere(gate: Gate, t: int) -> np.ndarray:
    return np.array(True)


def _nowhere(gate: Gate, t: int) -> np.ndarray:
    return np.array(False)


def _halves(gate: Gate, t: int) -> np.ndarray:
    """Left half, then the right, and so on: every active tile is newly active."""
    left = np.arange(gate.grid[1]) < gate.grid[1] // 2
    return left if t % 2 == 0 else ~left


def _growing(gate: Gate, t: int) -> np.ndarray:
    """One more row of tiles a frame, none at first."""
    return (np.arange(gate.grid[0]) < t)[:, None]


def _one(gate: Gate, t: int) -> np.ndarray:
    """A single tile that walks."""
    rows, columns = gate.grid
    return np.arange(rows * columns).reshape(gate.grid) == (5 * t + gate.index) % (rows * columns)


def _checkers(gate: Gate, t: int) -> np.ndarray:
    return np.add.outer(np.arange(gate.grid[0]), np.arange(gate.grid[1])) % 2 == t % 2


def _mixed(gate: Gate, t: int) -> np.ndarray:
    """Every pair of actions in two successive frames, in some channel."""
    channel = np.arange(gate.channels) + gate.index
    return (channel // 3 ** (t % 3)) % 3


def _blocks_of(gate: Gate, t: int) -> np.ndarray:
    """Runs of 16 channels alike, so that whole groups are left out."""
    return (np.arange(gate.channels) // 16 + t + gate.index) % 3


PATTERNS: Mapping[str, tuple[Callable[[Gate, int], np.ndarray], Callable[[Gate, int], np.ndarray]]] = {
    "first frame reuses": (_series(1, 1, 2, 1, 1, 2), _everywhere),
    "reuse after skip": (_series(2, 0, 1, 0, 1, 2), _everywhere),
    "reuse after reuse": (_series(2, 1, 1, 1, 1, 1), _halves),
    "tiles newly active under reuse": (_series(2, 1, 2, 1, 1, 1), _growing),
    "halves computed, then reused": (_series(2, 1, 2, 1, 2, 1), _halves),
    "no tile active": (_series(2, 2, 1, 0, 1, 2), _nowhere),
    "no channel active": (_series(0, 0, 0, 0, 0, 0), _everywhere),
    "everything computed": (_series(2, 2, 2, 2, 2, 2), _everywhere),
    "nothing, then everything reused": (_series(0, 0, 0, 1, 0, 1), lambda gate, t: np.array(t >= 3)),
    "one tile": (_mixed, _one),
    "alternating": (_series(2, 1, 2, 1, 2, 1), _checkers),
    "all pairs of actions": (_mixed, _everywhere),
    "groups of channels": (_blocks_of, _checkers),
}


def pattern(kind: str, size: str, name: str) -> Decisions:
    """The forced inputs of a named pattern."""
    return _of_gates(kind, size, *PATTERNS[name])


def random_decisions(kind: str, size: str, seed: int, share: float) -> Decisions:
    """Independent draws: tiles active at rate `share`, actions from a draw of rates per gate and frame."""
    rng = np.random.default_rng(seed)
    return _of_gates(
        kind, size,
        lambda gate, t: rng.choice(3, gate.channels, p=rng.dirichlet([0.5, 0.5, 0.5])),
        lambda gate, t: rng.random(gate.grid) < share,
    )  # fmt: skip
