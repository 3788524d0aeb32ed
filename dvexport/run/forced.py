"""Steps with forced decisions: they exercise every gate, whatever a clip makes it decide.

A gate that is idle on a clip proves nothing of its lowering. So the artifact's forced variant runs frames of the golden
clip under drawn decisions; this variant has the lowerings and kernels of the one that ships. The decisions are
everything, nothing, reuse of what was skipped, tiles that become active, and mixtures. Mixtures differ from gate to
gate so that errors don't cancel. The golden data holds what PyTorch gives under the same decisions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from dvexport.decisions import ACTION, FORCED, TILES, TOKENS, Action, Key, decision_key, forced_name
from dvexport.errors import BundleError
from dvexport.graph.graph import depends_on_input, whole_clip_of
from dvexport.passes.expose_probes import decision_values
from dvexport.ports import LOGITS
from dvexport.run.possible import possible_actions
from dvexport.run.session import Decisions, Step

__all__ = ["STEPS", "ForcedRun", "draw", "pack", "unpack"]

STEPS = 8
"""Forced frames at least: one round of what `draw` goes through."""

_FORCED_OUTPUT = "forced_"
"""Before the name of an output, in golden data."""
_FRAMES = "forced_frames"


@dataclass(frozen=True)
class ForcedRun:
    """One run from a reset.

    Attributes:
        frames: int64 `[T]`: which of the golden frames are fed.
        decisions: each frame's decisions.
        outputs: by name, frames first, what the reference gives; None before it ran.
    """

    frames: np.ndarray
    decisions: Sequence[Decisions]
    outputs: Mapping[str, np.ndarray] | None = None

    def steps(self) -> list[Step]:
        """Return the reference's results as steps."""
        assert self.outputs is not None
        return [
            Step({name: value[i] for name, value in self.outputs.items()}, dict(given))
            for i, given in enumerate(self.decisions)
        ]

    def with_outputs(self, outputs: Mapping[str, np.ndarray]) -> ForcedRun:
        """Return the run with the reference's results."""
        return replace(self, outputs=outputs)


def draw(traced: ir.Model, own: Decisions, golden_frames: int, run_frames: int | None) -> list[ForcedRun]:
    """Return runs that take every gate through all it can decide, the same each time; none where nothing decides.

    A model that reads a clip as one gets none either: a run of it has no frames to go through.

    Args:
        traced: gate level. Gates that share a decision get the same one.
        own: the decisions of a frame, which those that depend on no input stay.
        golden_frames: how many there are to feed.
        run_frames: frames of a run; None for a stream, which takes any number.
    """
    decided = {key: value for key, value in decision_values(traced).items() if key[1] != TOKENS.name}
    free = [value for value in decided.values() if depends_on_input(value)]
    if not free or whole_clip_of(traced) is not None:
        return []
    length = run_frames or STEPS
    count = -(-STEPS // length) * length
    gates, numbers = list(dict.fromkeys(gate for gate, _ in decided)), {value: i for i, value in enumerate(free)}
    by_value: dict[ir.Value, list[np.ndarray]] = {}
    for (gate, kind), value in decided.items():
        if value in by_value:
            continue
        one = _Gate(gates.index(gate), numbers.get(value, 0), own[gate, kind].shape)
        if value not in numbers:
            by_value[value] = [own[gate, kind]] * count
        else:
            by_value[value] = one.tiles(count) if kind == TILES.name else one.actions(count, possible_actions(value))
    steps = [{key: by_value[value][i] for key, value in decided.items()} for i in range(count)]
    return [
        ForcedRun(np.arange(at, at + length) % golden_frames, steps[at : at + length]) for at in range(0, count, length)
    ]


@dataclass(frozen=True)
class _Gate:
    """Draws one decision of a gate: eight frames a round, the gates' parts exchanged in every other round.

    What a model may have no finite result for comes last: nothing.

    Attributes:
        gate: its index; gates of odd index compute without tiles where others skip with all tiles.
        number: the decision's number, which seeds draws of its own.
        shape: the shape of one frame's decision.
    """

    gate: int
    number: int
    shape: tuple[int, ...]

    def actions(self, count: int, allowed: tuple[int, ...]) -> list[np.ndarray]:
        """Mixed; computed; reused; two mixtures with every pair of actions; skipped or computed; reused; skipped."""
        return [self._action(i, allowed) for i in range(count)]

    def tiles(self, count: int) -> list[np.ndarray]:
        """Mixed; all; all; two mixtures with every pair of states; all or none; all; none."""
        return [self._tiles(i) for i in range(count)]

    def _odd(self, index: int) -> bool:
        return (self.gate + index // STEPS) % 2 == 1

    def _action(self, index: int, allowed: tuple[int, ...]) -> np.ndarray:
        whole = {
            1: Action.COMPUTE,
            2: Action.REUSE,
            5: Action.COMPUTE if self._odd(index) else Action.SKIP,
            6: Action.REUSE,
            7: Action.SKIP,
        }.get(index % STEPS)
        if whole is None:
            return np.array(allowed, np.int64)[self._mixed(index, len(allowed))]
        least, most = allowed[0], allowed[-1]
        return np.full(self.shape, whole if whole in allowed else least if whole == Action.SKIP else most, np.int64)

    def _tiles(self, index: int) -> np.ndarray:
        whole = {1: True, 2: True, 5: not self._odd(index), 6: True, 7: False}.get(index % STEPS)
        if whole is None:
            return self._mixed(index, 2) == 1
        return np.full(self.shape, whole)

    def _mixed(self, index: int, kinds: int) -> np.ndarray:
        """Return as many of each kind, shuffled; of an odd frame and the next one, as many of each pair."""
        size = int(np.prod(self.shape))
        order = np.random.default_rng([self.number, (index + 1) // 2]).permutation(size)
        return (order // (1 if index % 2 else kinds) % kinds).reshape(self.shape)


def pack(runs: Sequence[ForcedRun]) -> dict[str, np.ndarray]:
    """Return the runs as arrays of the golden data, a byte for a decision; nothing for no runs."""
    if not runs:
        return {}
    arrays = {_FRAMES: np.stack([run.frames for run in runs])}
    for name in runs[0].outputs or ():
        arrays[_FORCED_OUTPUT + name] = np.stack([run.outputs[name] for run in runs if run.outputs is not None])
    for key in runs[0].decisions[0]:
        values = np.stack([[given[key] for given in run.decisions] for run in runs])
        arrays[forced_name(*key)] = values if values.dtype == bool else values.astype(np.uint8)
    return arrays


def unpack(golden: Mapping[str, np.ndarray], where: str, outputs: Collection[str] = (LOGITS,)) -> list[ForcedRun]:
    """Return the runs that `pack` stored, none where there are none.

    Args:
        where: the bundle, for errors.
        outputs: names of the model's outputs.

    Raises:
        BundleError: arrays are missing or don't fit each other.
    """
    stored = {key: array for name, array in golden.items() if (key := decision_key(name, FORCED))}
    given = {name: golden[_FORCED_OUTPUT + name] for name in outputs if _FORCED_OUTPUT + name in golden}
    frames, available = golden.get(_FRAMES), len(golden[next(iter(outputs))])
    if frames is None and not given and not stored:
        return []
    if frames is None or len(given) < len(outputs) or not _fit(frames, given, stored, available):
        raise BundleError("the golden data is incomplete", where=where, why="its forced steps don't fit each other")
    return [
        ForcedRun(
            frames[i],
            [
                {key: a[i, t] if a.dtype == bool else a[i, t].astype(np.int64) for key, a in stored.items()}
                for t in range(frames.shape[1])
            ],
            {name: value[i] for name, value in given.items()},
        )
        for i in range(len(frames))
    ]


def _fit(frames: np.ndarray, given: Mapping[str, np.ndarray], stored: Mapping[Key, np.ndarray], available: int) -> bool:
    if frames.ndim != 2 or not frames.size or frames.dtype != np.int64 or not stored:
        return False
    if frames.min() < 0 or frames.max() >= available:
        return False
    types = {ACTION.name: np.uint8, TILES.name: np.bool_}
    right = all(array.ndim > 2 and array.dtype == types.get(key[1]) for key, array in stored.items())
    return right and all(array.shape[:2] == frames.shape for array in (*given.values(), *stored.values()))
