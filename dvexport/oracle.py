"""The oracle: the traced gate-level model itself, run through its operators' references.

Every dialect node carries its specification as a model-local function in standard ONNX (`dvexport.dialect`),
so ONNX Runtime runs the model as it was traced, all work done and then masked. Whatever a lowering
does is compared with this.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from dvexport.dialect.spec import attach_references
from dvexport.passes.expose_probes import ExposeProbes, ForceDecisions, decision_values, forced_name
from dvexport.session import Step, steps_of
from dvexport.targets.onnx.backend import model_apart
from dvexport.targets.onnx.runtime import OrtSession

__all__ = ["Oracle"]


class Oracle:
    """A gate-level model with a dynamic frame axis, ready to run; the model is not modified.

    Raises:
        DeviceError: ONNX Runtime is missing, or can't load the model.
    """

    def __init__(self, gate_level: ir.Model, *, threads: int = 1) -> None:
        model = gate_level.clone()
        self._tokens = [gate for gate, kind in decision_values(model) if kind == "tokens"]
        ExposeProbes()(model)
        ForceDecisions(kinds=("tokens",))(model)
        attach_references(model)
        text, weights = model_apart(model)
        self._runtime = OrtSession(text, weights=weights, threads=threads)

    def run_clip(self, frames: np.ndarray, follow: Sequence[Step] = ()) -> list[Step]:
        """Return what each frame of a clip gives.

        Args:
            frames: float32 `[T, 3, H, W]`, normalised; any T that the model takes.
            follow: for a model that chooses tokens, the run whose tokens are taken; its own are told.
        """
        feeds = {"frames": frames}
        for gate in self._tokens:
            feeds[forced_name(gate, "tokens")] = follow[0].decisions[gate, "tokens"][None]
        outputs = self._runtime.run(feeds)
        return steps_of(outputs, self._runtime.seconds)
