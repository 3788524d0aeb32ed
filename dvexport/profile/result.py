"""The profile of one bundle on one clip, as plain data with a JSON form.

Three figures sum it up (the design's words): the *speed-up* over the dense artifact of the same
model and backend, the *FLOP ratio* that the gates' decisions would allow, and their quotient, the
*realisation*: 1.0 when every saved multiply-accumulate is saved time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dvexport.errors import UsageError
from dvexport.files import atomic_write
from dvexport.profile.samples import MinMeanMax, StepTimes, ratio
from dvexport.targets.times import NodeTime

__all__ = [
    "ClipInfo",
    "DeviceInfo",
    "GateStats",
    "GateStep",
    "Method",
    "MinMeanMax",
    "ProfileResult",
    "StepStats",
    "StepTimes",
    "TokenStage",
    "write_json",
]

FORMAT = 1


@dataclass
class GateStep:
    """What one gate decided on one frame.

    Args:
        skip, reuse, compute: number of output channels with that action.
        tiles_active, tiles_total: cells of the tile grid; both 1 where the gate has no tiles.
        tile_mask: `gh` rows of `gw` cells, nonzero where active; None without tiles.
    """

    skip: int
    reuse: int
    compute: int
    tiles_active: int = 1
    tiles_total: int = 1
    tile_mask: list[list[int]] | None = None

    @property
    def channels(self) -> int:
        """Output channels under the gate."""
        return self.skip + self.reuse + self.compute

    @property
    def compute_share(self) -> float:
        """Share of the channels computed, 0 to 1."""
        return self.compute / max(self.channels, 1)

    @property
    def tile_share(self) -> float:
        """Share of the tiles active, 0 to 1."""
        return self.tiles_active / max(self.tiles_total, 1)


@dataclass
class StepStats:
    """One frame of the clip.

    Args:
        frame: index in the clip.
        latency_ms: median over the repeats; in clip mode the step's share of one frame.
        executed_macs: multiply-accumulates this input asked for.
        dense_macs: those of the dense artifact.
        gates: by gate name.
        label, prob: the prediction after this frame.
    """

    frame: int
    latency_ms: float
    executed_macs: int
    dense_macs: int
    gates: dict[str, GateStep] = field(default_factory=dict)
    label: str | None = None
    prob: float | None = None


@dataclass
class GateStats:
    """One gate over the whole clip.

    Args:
        gate: its name, such as `layer1.0`.
        lowering: what it became: `tiles`, `groups`, `masked`, `dense`, ...
        reason: why that lowering was chosen.
        channels: output channels under the gate.
        grid: rows and columns of the tile grid; None without tiles.
        executed_gmacs: per frame.
        dense_gmacs: per frame, with the gate always computing.
        median_ms: time of the gate's nodes in the gated artifact, decision included; None: unknown.
        dense_median_ms: time of the same layers in the dense artifact.
        expected_ms: what the target's cost table promised for each lowering; empty without a table.
    """

    gate: str
    lowering: str
    reason: str
    channels: int
    grid: tuple[int, int] | None
    executed_gmacs: MinMeanMax
    dense_gmacs: float
    median_ms: float | None = None
    dense_median_ms: float | None = None
    expected_ms: dict[str, float] = field(default_factory=dict)

    @property
    def executed_fraction(self) -> float:
        """Mean executed over dense multiply-accumulates, 0 to 1."""
        return ratio(self.executed_gmacs.mean, self.dense_gmacs) or 0.0

    @property
    def flop_ratio(self) -> float | None:
        """Dense over mean executed GMACs; None when nothing was ever executed."""
        return ratio(self.dense_gmacs, self.executed_gmacs.mean)

    @property
    def speedup(self) -> float | None:
        """Dense over gated median; None when one was not measured."""
        return ratio(self.dense_median_ms, self.median_ms)

    @property
    def realisation(self) -> float | None:
        """Speed-up over FLOP ratio."""
        return ratio(self.speedup, self.flop_ratio)


@dataclass
class TokenStage:
    """One place where a video transformer drops tokens.

    Args:
        name: what its gates' names share.
        groups, tokens, keep: number of groups, tokens of a group before and after.
        left: 1 where a token is left, `[time][height][width]` of the first tokens, or of merged ones; None: the model
            does not tell where they lie.
    """

    name: str
    groups: int
    tokens: int
    keep: int
    left: list[list[list[int]]] | None = None


@dataclass
class ClipInfo:
    """The clip: its name, number of frames and frame rate (None: unknown)."""

    name: str
    frames: int
    fps: float | None = None


@dataclass
class DeviceInfo:
    """Where it ran; None where the system does not tell.

    `is_target`: this machine has the kind of processor that the artifact was made for; None where that is not known.
    """

    cpu: str
    cores: int
    threads: int
    runtime: str
    runtime_version: str
    os: str
    governor: str | None = None
    frequencies_mhz: list[float] | None = None
    temperature_c: float | None = None
    is_target: bool | None = None


@dataclass
class Method:
    """How it was measured.

    Args:
        warmup: steps run before measuring, of each artifact.
        repeats: measured passes over the clip.
        interleaved: gated and dense passes alternate (A-B-A-B), so that drift hits both alike.
    """

    warmup: int
    repeats: int
    interleaved: bool = True


@dataclass
class ProfileResult:
    """The profile of one bundle on one clip.

    `forced` holds the rates of random decisions that replaced the model's, None with its own.
    `tokens_ms` is the median time of choosing tokens in all stages, None where that is not known.
    `dense` is the dense artifact of the same model and backend, None when it was not measured.
    `whole_clip`: the model reads a clip as one, so that a step is a clip.
    """

    model: str
    target: str
    backend: str
    mode: str
    clip: ClipInfo
    device: DeviceInfo
    method: Method
    forced: dict[str, float] | None
    gated: StepTimes
    dense: StepTimes | None
    steps: list[StepStats]
    gates: list[GateStats] = field(default_factory=list)
    nodes: list[NodeTime] = field(default_factory=list)
    tokens: list[TokenStage] = field(default_factory=list)
    tokens_ms: float | None = None
    whole_clip: bool = False

    @property
    def unit(self) -> str:
        """What a step takes: a frame, or a clip at once."""
        return "clip" if self.whole_clip else "frame"

    @property
    def executed_gmacs(self) -> MinMeanMax:
        """Executed GMACs per frame over the clip."""
        return MinMeanMax.of([step.executed_macs / 1e9 for step in self.steps])

    @property
    def dense_gmacs(self) -> float:
        """GMACs per frame of the dense artifact."""
        return float(np.mean([step.dense_macs for step in self.steps])) / 1e9

    @property
    def flop_ratio(self) -> float | None:
        """Dense over mean executed multiply-accumulates; above 1 means saved."""
        return ratio(self.dense_gmacs, self.executed_gmacs.mean)

    @property
    def speedup(self) -> float | None:
        """Dense over gated median latency; None without a dense artifact."""
        return ratio(self.dense.median if self.dense else None, self.gated.median)

    @property
    def realisation(self) -> float | None:
        """Speed-up over FLOP ratio: 1.0 when every saved FLOP is saved time."""
        return ratio(self.speedup, self.flop_ratio)

    @property
    def timeline(self) -> list[NodeTime]:
        """The nodes in the order they began in one step, the enclosing before the enclosed."""
        return sorted(self.nodes, key=lambda node: (node.start_us, -node.timeline_us))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: the three headline figures first, then the data."""
        summary = {
            "speedup": self.speedup,
            "flop_ratio": self.flop_ratio,
            "realisation": self.realisation,
            "median_ms": self.gated.median,
            "dense_median_ms": self.dense.median if self.dense else None,
            "format": FORMAT,
        }
        return _plain(summary | asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ProfileResult:
        """Read `to_dict`'s form; derived figures are computed anew.

        Raises:
            UsageError: a key is missing or wrong, or the format is newer than this version's.
        """
        try:
            if data["format"] > FORMAT:
                raise UsageError(f"profile format {data['format']} is newer than this dvexport", hint="update dvexport")
            return cls(
                **{key: data[key] for key in ("model", "target", "backend", "mode", "forced")},
                clip=ClipInfo(**data["clip"]),
                device=DeviceInfo(**data["device"]),
                method=Method(**data["method"]),
                gated=StepTimes(**data["gated"]),
                dense=StepTimes(**data["dense"]) if data["dense"] else None,
                steps=[_step(item) for item in data["steps"]],
                gates=[_gate(item) for item in data["gates"]],
                nodes=[NodeTime(**item) for item in data["nodes"]],
                tokens=[TokenStage(**item) for item in data.get("tokens", [])],
                tokens_ms=data.get("tokens_ms"),
                whole_clip=data.get("whole_clip", bool(data.get("tokens"))),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                "this is not a dvexport profile",
                why=f"missing key {error}" if isinstance(error, KeyError) else str(error),
                hint="write one with: dvexport profile BUNDLE --json FILE",
            ) from error


def _step(data: Mapping[str, Any]) -> StepStats:
    gates = {name: GateStep(**item) for name, item in data["gates"].items()}
    return StepStats(**{**data, "gates": gates})


def _gate(data: Mapping[str, Any]) -> GateStats:
    grid = tuple(data["grid"]) if data["grid"] else None
    return GateStats(**{**data, "grid": grid, "executed_gmacs": MinMeanMax(**data["executed_gmacs"])})


def _plain(value: Any) -> Any:
    """Return `value` with NumPy scalars and arrays as Python numbers and lists."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def write_json(result: ProfileResult, path: str | Path, advice: Iterable[Mapping[str, Any]] = ()) -> None:
    """Write the JSON form, with `advice` (`Advice.to_dict`) as its last key; nothing half-written is left at `path`."""
    text = json.dumps(result.to_dict() | {"advice": list(advice)}, indent=1) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
