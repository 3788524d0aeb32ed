"""The oracle: the traced gate-level model itself, run through its operators' references.

Every dialect node carries its specification as a model-local function in standard ONNX (`dvexport.dialect`),
so ONNX Runtime runs the model as it was traced, all work done and then masked. Whatever a lowering
does is compared with this.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dvexport.dialect.spec import attach_references
from dvexport.passes.expose_probes import ExposeProbes
from dvexport.session import Step, steps_of
from dvexport.targets.onnx.backend import model_bytes
from dvexport.targets.onnx.runtime import OrtSession

__all__ = ["Oracle"]


class Oracle:
    """A gate-level model with a dynamic frame axis, ready to run; the model is not modified.

    Raises:
        DeviceError: ONNX Runtime is missing, or can't load the model.
    """

    def __init__(self, gate_level: ir.Model, *, threads: int = 1) -> None:
        model = gate_level.clone()
        ExposeProbes()(model)
        attach_references(model)
        self._runtime = OrtSession(model_bytes(model), threads=threads)

    def run_clip(self, frames: np.ndarray) -> list[Step]:
        """Return what each frame of a clip gives.

        Args:
            frames: float32 `[T, 3, H, W]`, normalised; any T.
        """
        outputs = self._runtime.run({"frames": frames})
        return steps_of(outputs, self._runtime.seconds)
