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
from dvexport.targets.runtime import Runtime

__all__ = ["Decisions", "Session", "Step", "steps_of"]


Decisions = dict[Key, np.ndarray]
"""By gate and kind: `action` int64 `[C]` of 0 skip, 1 reuse, 2 compute; `tiles` bool `[gh, gw]`; `tokens` int64
`[keep]`, places of the tokens that go on, in their new order."""


@dataclass(frozen=True)
class Step:
    """What one frame gave.

    Attributes:
        logits: float32 `[classes]`: the consensus over this frame and all before it.
        decisions: those that were applied; empty for the dense variant.
        seconds: time inside the runtime; in clip mode the frame's share of it.
    """

    logits: np.ndarray
    decisions: Decisions = field(default_factory=dict)
    seconds: float = 0.0


class Session:
    """A bundle ready to run; use `open_session`, in a `with` statement or with `close` at its end.

    Attributes:
        mode: `stream` or `clip`.
        frames: frames of one run: 1 in stream mode, T in clip mode.
        whole_clip: a run gives one result for all its frames.
        labels: class names in the order of the logits.
        decisions: shape of every decision of one frame, by (gate, kind).
    """

    def __init__(self, runtime: Runtime, *, mode: str, labels: Sequence[str] = ()) -> None:
        self.runtime = runtime
        self.mode = mode
        self.labels = list(labels)
        _check_ports(runtime)
        self._input_shape = runtime.inputs["frames"].shape
        self.frames = int(self._input_shape[0])
        rows = int(runtime.outputs["logits"].shape[0])
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

    def step(self, frame: np.ndarray, forced: Mapping[Key, np.ndarray] | None = None) -> Step:
        """Run one frame of a stream.

        Args:
            frame: float32 `[1, 3, H, W]`, normalised as the bundle's preprocessing says.
            forced: every decision of the frame, for the `forced` variant only.

        Raises:
            UsageError: a clip-mode bundle; a wrong shape, type or value; decisions that do not fit.
            DeviceError: the runtime fails, or the session is closed.
        """
        if self.mode != "stream":
            raise UsageError("a clip-mode bundle runs whole clips", hint="use run_clip, or export in stream mode")
        return self._run(frame, None if forced is None else [forced])[0]

    def run_clip(self, frames: np.ndarray, forced: Sequence[Mapping[Key, np.ndarray]] | None = None) -> list[Step]:
        """Run a clip from its first frame: as a fresh stream, or at once in clip mode.

        Args:
            frames: float32 `[T, 3, H, W]`; in clip mode T must be the bundle's.
            forced: every decision of every frame, for the `forced` variant only.

        Returns:
            One step a frame; a single one where the model reads the clip as one.

        Raises:
            UsageError, DeviceError: as `step`.
        """
        if self.mode == "clip":
            return self._run(frames, forced)
        if getattr(frames, "ndim", 0) != 4 or len(frames) == 0:
            raise UsageError("a clip is float32 [T, 3, H, W]", why=f"this is {_described(frames)}")
        if forced is not None and len(forced) != len(frames):
            raise UsageError(f"{len(forced)} decisions were given for {len(frames)} frames")
        self.reset()
        return [self.step(frames[i : i + 1], forced[i] if forced else None) for i in range(len(frames))]

    def _run(self, frames: np.ndarray, forced: Sequence[Mapping[Key, np.ndarray]] | None) -> list[Step]:
        self._check_frames(frames)
        feeds = {"frames": frames, **self._forced_feeds(forced)}
        steps = steps_of(self.runtime.run(feeds), self.runtime.seconds)
        if not forced:
            return steps
        return [Step(step.logits, dict(given), step.seconds) for step, given in zip(steps, forced, strict=True)]

    def _check_frames(self, frames: np.ndarray) -> None:
        shape = list(self._input_shape)
        if not isinstance(frames, np.ndarray) or list(frames.shape) != shape or frames.dtype != np.float32:
            raise UsageError(
                f"the input must be float32 of shape {shape}",
                why=f"it is {_described(frames)}",
                hint="dvexport.video.clips.stream_frames and read_clip prepare frames as the model expects",
            )
        if not np.isfinite(frames).all():
            raise UsageError("the input has NaN or infinite values", hint="check the frame's normalisation")

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


def _check_ports(runtime: Runtime) -> None:
    """Raise DeviceError for an artifact that takes no frames, or gives no logits, of a fixed shape."""
    for name, ports, rank in (("frames", runtime.inputs, 4), ("logits", runtime.outputs, 2)):
        found = ports.get(name)
        if found is None or len(found.shape) != rank or not all(isinstance(size, int) for size in found.shape):
            why = f"it has {', '.join(ports) or 'none'}" if found is None else f"its shape is {list(found.shape)}"
            raise DeviceError(f"the artifact has no '{name}' of {rank} fixed sizes", why=why)


def steps_of(outputs: Mapping[str, np.ndarray], seconds: float) -> list[Step]:
    """Cut the outputs of one run into one `Step` a frame."""
    logits = outputs["logits"]
    probes = {key: value for name, value in outputs.items() if (key := decision_key(name, PROBE))}
    share = seconds / len(logits)
    return [Step(logits[i], {key: value[i] for key, value in probes.items()}, share) for i in range(len(logits))]


def _described(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {list(value.shape)}"
    return f"a {type(value).__name__}"
