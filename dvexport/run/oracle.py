"""The oracle: the traced gate-level model itself, run through its operators' references.

Every dialect node carries its specification as a model-local function in standard ONNX (`dvexport.dialect`),
so ONNX Runtime runs the model as it was traced, all work done and then masked. Whatever a lowering
does is compared with this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from dvexport.decisions import FORCED, KINDS, TOKENS, decision_key, forced_name
from dvexport.dialect.spec import attach_references
from dvexport.graph.onnx_file import model_apart
from dvexport.passes.expose_probes import ExposeProbes, ForceDecisions, decision_values
from dvexport.run.feeds import Given, by_name
from dvexport.run.session import Step, steps_of
from dvexport.targets.onnx.runtime import OrtSession

__all__ = ["Oracle"]


class Oracle:
    """A gate-level model with a dynamic frame axis, ready to run; the model is not modified.

    Args:
        forced: every decision is an input, and not the tokens alone.

    Raises:
        DeviceError: ONNX Runtime is missing, or can't load the model.
    """

    def __init__(self, gate_level: ir.Model, *, threads: int = 1, forced: bool = False) -> None:
        model = gate_level.clone()
        decisions = list(decision_values(model))
        self._forced = [key for key in decisions if forced or key[1] == TOKENS.name]
        ExposeProbes()(model)
        ForceDecisions(kinds=KINDS if forced else (TOKENS.name,))(model)
        attach_references(model)
        text, weights = model_apart(model)
        self._runtime = OrtSession(text, weights=weights, threads=threads)
        self._video = next(name for name in self._runtime.inputs if decision_key(name, FORCED) is None)

    def run_clip(self, frames: Given, follow: Sequence[Step] = ()) -> list[Step]:
        """Return what each frame of a clip gives.

        Args:
            frames: float32 `[T, 3, H, W]`, normalised; any T that the model takes; or every input by name.
            follow: for a model that chooses tokens, the run whose tokens are taken; its own are told.
        """
        return self.run_forced(frames, [step.decisions for step in follow])

    def run_forced(self, frames: Given, decisions: Sequence[Mapping[tuple[str, str], np.ndarray]]) -> list[Step]:
        """Return what each frame of a clip gives under the decisions of each; the steps tell the model's own.

        Args:
            frames: as `run_clip`.
            decisions: for each frame, every decision that is an input.
        """
        feeds = by_name(frames, self._video)
        for key in self._forced:
            feeds[forced_name(*key)] = np.stack([one[key] for one in decisions])
        outputs = self._runtime.run(feeds)
        return steps_of(outputs, self._runtime.seconds)
