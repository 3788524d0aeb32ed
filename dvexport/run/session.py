"""Run a bundle: one frame a step (stream), or all frames of a clip at once.

Three variants of the same weights can be opened. `gated` is the artifact that ships. `dense` has no
gates at all: what realisation is measured against; it is made from the traced model in the bundle. `forced` is
the artifact with its decisions as inputs: for checking every gate, and for measuring at chosen rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dvexport.decisions import FORCED, KINDS, PROBE, Key, decision_key
from dvexport.errors import DeviceError, UsageError
from dvexport.ports import LOGITS
from dvexport.run.feeds import Given, at, by_name, count
from dvexport.targets.runtime import Port, Runtime

__all__ = ["Decisions", "Session", "Step", "stacked_outputs", "steps_of"]


_VIDEO_HINT = "dvexport.video.clips.stream_frames and read_clip prepare frames as the model expects"

Decisions = dict[Key, np.ndarray]
"""By gate and kind: `action` int64 `[C]` of 0 skip, 1 reuse, 2 compute; `tiles` bool `[gh, gw]`; `tokens` int64
`[keep]`, places of the tokens that go on, in their new order."""


@dataclass(frozen=True)
class Step:
    """What one frame gave.

    Attributes:
        outputs: what the model gives, by name, without the frame axis. An array given alone is `logits`.
        decisions: those that were applied; empty for the dense variant.
        seconds: time inside the runtime; in clip mode the frame's share of it.
    """

    outputs: Mapping[str, np.ndarray]
    decisions: Decisions = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "outputs", by_name(self.outputs, LOGITS))

    @property
    def logits(self) -> np.ndarray:
        """The output `logits`: float32 `[classes]`, in a `VideoModel` the consensus over this frame and all before it.

        Raises:
            UsageError: the model is no classifier.
        """
        if LOGITS not in self.outputs:
            raise UsageError("the model gives no logits", hint=f"step.outputs has {', '.join(self.outputs)}")
        return self.outputs[LOGITS]


class Session:
    """A bundle ready to run; use `open_session`, in a `with` statement or with `close` at its end.

    Attributes:
        mode: `stream` or `clip`.
        inputs, outputs: what is fed and given, by name: shapes with the frame axis, and types. The first input is the
            video. Forced decisions and those shown are left out.
        frames: frames of one run: 1 in stream mode, T in clip mode.
        whole_clip: a run gives one result for all its frames.
        labels: class names in the order of the logits.
        decisions: shape of every decision of one frame, by (gate, kind).
    """

    def __init__(self, runtime: Runtime, *, mode: str, labels: Sequence[str] = ()) -> None:
        self.runtime = runtime
        self.mode = mode
        self.labels = list(labels)
        self.inputs = _ports("input", runtime.inputs, FORCED)
        self.outputs = _ports("output", runtime.outputs, PROBE)
        self.frames = int(next(iter(self.inputs.values())).shape[0])
        rows = int(next(iter(self.outputs.values())).shape[0])
        self.whole_clip = rows == 1 < self.frames
        self._rows = rows
        self._forced = {key: name for name in runtime.inputs if (key := decision_key(name, FORCED))}
        self.decisions = {
            key: tuple(int(size) for size in port.shape[1:])
            for name, port in runtime.outputs.items()
            if (key := decision_key(name, PROBE))
        }

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free memory and threads and unload compiled code; a closed session can't be used, and may be closed again.

        A session that nobody holds any more is closed by itself.
        """
        self.runtime.close()

    def reset(self) -> None:
        """Forget all frames before: the next step is the first of a stream."""
        self.runtime.reset()

    def step(self, frame: Given, forced: Mapping[Key, np.ndarray] | None = None) -> Step:
        """Run one frame of a stream.

        Args:
            frame: float32 `[1, 3, H, W]`, normalised as the bundle's preprocessing says; for a model that takes more,
                every input by name, each with a first axis of 1.
            forced: every decision of the frame, for the `forced` variant only.

        Raises:
            UsageError: a clip-mode bundle; a wrong shape, type or value; decisions that do not fit.
            DeviceError: the runtime fails, or the session is closed.
        """
        if self.mode != "stream":
            raise UsageError("a clip-mode bundle runs whole clips", hint="use run_clip, or export in stream mode")
        return self._run(frame, None if forced is None else [forced])[0]

    def run_clip(self, frames: Given, forced: Sequence[Mapping[Key, np.ndarray]] | None = None) -> list[Step]:
        """Run a clip from its first frame: as a fresh stream, or at once in clip mode.

        Args:
            frames: float32 `[T, 3, H, W]`; in clip mode T must be the bundle's. Or every input by name, T rows each.
            forced: every decision of every frame, for the `forced` variant only.

        Returns:
            One step a frame; a single one where the model reads the clip as one.

        Raises:
            UsageError, DeviceError: as `step`.
        """
        if self.mode == "clip":
            return self._run(frames, forced)
        feeds = by_name(frames, next(iter(self.inputs)))
        _check_clip(feeds)
        length = count(feeds)
        if forced is not None and len(forced) != length:
            raise UsageError(f"{len(forced)} decisions were given for {length} frames")
        self.reset()
        return [self.step(at(feeds, slice(i, i + 1)), forced[i] if forced else None) for i in range(length)]

    def _run(self, given: Given, forced: Sequence[Mapping[Key, np.ndarray]] | None) -> list[Step]:
        feeds = by_name(given, next(iter(self.inputs)))
        self._check_feeds(feeds)
        feeds |= self._forced_feeds(forced)
        steps = steps_of(self.runtime.run(feeds), self.runtime.seconds)
        if not forced:
            return steps
        return [Step(step.outputs, dict(one), step.seconds) for step, one in zip(steps, forced, strict=True)]

    def _check_feeds(self, feeds: Mapping[str, object]) -> None:
        takes = f"the model takes {', '.join(self.inputs)}"
        for name in feeds:
            if name not in self.inputs:
                raise UsageError(f"there is no input '{name}'", why=takes)
        for index, (name, port) in enumerate(self.inputs.items()):
            if name not in feeds:
                raise UsageError(f"the input '{name}' is missing", why=takes, hint="give every input by its name")
            array, shape = feeds[name], list(port.shape)
            what = "the input" if len(self.inputs) == 1 else f"the input '{name}'"
            if not isinstance(array, np.ndarray) or list(array.shape) != shape or array.dtype != port.dtype:
                raise UsageError(
                    f"{what} must be {port.dtype} of shape {shape}",
                    why=f"it is {_described(array)}",
                    hint=None if index else _VIDEO_HINT,
                )
            if not np.isfinite(array).all():
                raise UsageError(f"{what} has NaN or infinite values", hint="check its normalisation")

    def _forced_feeds(self, forced: Sequence[Mapping[Key, np.ndarray]] | None) -> dict[str, np.ndarray]:
        if not self._forced:
            if forced is not None:
                raise UsageError("only the forced variant takes decisions", hint="open_session(variant='forced')")
            return {}
        if forced is None:
            raise UsageError("the forced variant needs the decisions of every frame")
        if len(forced) != self._rows:
            rows = "one clip" if self.whole_clip else f"{self.frames} frames"
            raise UsageError(f"{len(forced)} decisions were given for {rows}")
        return {name: self._stacked(name, key, forced) for key, name in self._forced.items()}

    def _stacked(self, name: str, key: Key, forced: Sequence[Mapping[Key, np.ndarray]]) -> np.ndarray:
        port = self.runtime.inputs[name]
        where = f"gate '{key[0]}', {key[1]}"
        if any(key not in decisions for decisions in forced):
            raise UsageError("a forced decision is missing", where=where)
        stacked = np.stack([decisions[key] for decisions in forced])
        if stacked.shape != port.shape or stacked.dtype != port.dtype:
            raise UsageError(
                f"a forced decision must be {port.dtype} of shape {list(port.shape[1:])}",
                where=where,
                why=f"it is {stacked.dtype} of shape {list(stacked.shape[1:])}",
            )
        if problem := KINDS[key[1]].problem(stacked):
            raise UsageError(problem, where=where)
        return stacked


def _ports(what: str, ports: Mapping[str, Port], decisions: str) -> dict[str, Port]:
    """Return the ports that carry no decision; DeviceError if there are none, or not all have one number of frames."""
    found = {name: port for name, port in ports.items() if decision_key(name, decisions) is None}
    for name, port in found.items():
        if not port.shape or not all(isinstance(size, int) for size in port.shape):
            why = f"its shape is {list(port.shape)}"
            raise DeviceError(f"the artifact has no {what} '{name}' of fixed sizes, frames first", why=why)
    if len({port.shape[0] for port in found.values()}) != 1:
        why = ", ".join(f"{name} {list(port.shape)}" for name, port in found.items()) or "it has none"
        raise DeviceError(f"the artifact has no {what}s of one number of frames", why=why)
    return found


def _check_clip(feeds: Mapping[str, object]) -> None:
    """Raise UsageError unless every input has frames, and as many as the others."""
    lengths = set()
    for name, array in feeds.items():
        if not isinstance(array, np.ndarray) or array.ndim == 0 or len(array) == 0:
            what = "a clip is float32 [T, 3, H, W]" if len(feeds) == 1 else f"the input '{name}' has no frames"
            raise UsageError(what, why=f"this is {_described(array)}")
        lengths.add(len(array))
    if len(lengths) != 1:
        told = ", ".join(f"{name} {_described(array)}" for name, array in feeds.items()) or "none is given"
        raise UsageError("all inputs of a clip have the same number of frames", why=told)


def steps_of(outputs: Mapping[str, np.ndarray], seconds: float) -> list[Step]:
    """Cut the outputs of one run into one `Step` a frame."""
    probes = {key: value for name, value in outputs.items() if (key := decision_key(name, PROBE))}
    given = {name: value for name, value in outputs.items() if decision_key(name, PROBE) is None}
    rows = count(given)
    return [
        Step(
            {name: value[i] for name, value in given.items()},
            {key: value[i] for key, value in probes.items()},
            seconds / rows,
        )
        for i in range(rows)
    ]


def stacked_outputs(steps: Sequence[Step]) -> dict[str, np.ndarray]:
    """Return the outputs of steps by name, frames first."""
    return {name: np.stack([step.outputs[name] for step in steps]) for name in steps[0].outputs}


def _described(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {list(value.shape)}"
    return f"a {type(value).__name__}"
