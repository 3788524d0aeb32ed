"""Whether two graphs compute the same: both run on noise in ONNX Runtime, dialect operators by their references."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dvexport.dialect.spec import attach_references
from dvexport.errors import PassError
from dvexport.graph.graph import FRAMES
from dvexport.graph.weights import split_weights

__all__ = ["check_same_numbers"]

_TOLERANCE = 1e-4  # relative to the largest output: batch norms are folded in another order
_FLIPS = 1e-3
"""Share of whole numbers and truth values that may differ: comparisons whose sides are equal but for rounding."""

_FRAMES = 3
_DRAWS = 3


def check_same_numbers(before: ir.Model, after: ir.Model) -> None:
    """Compare all outputs on three frames of noise; PassError if they differ.

    A decision that hangs on the last bit may fall either way and change all that follows. So a difference counts only
    if other noise shows one too.
    """
    found = None
    for draw in range(_DRAWS):
        found = _difference(_outputs(before, draw), _outputs(after, draw))
        if found is None:
            return
    assert found is not None
    raise PassError("simplifying changed the model's numbers", where=found[0], why=found[1])


def _difference(numbers: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> tuple[str, str] | None:
    for name, value in numbers.items():
        other = others[name]
        if value.shape != other.shape:
            return name, f"the shape was {list(value.shape)} and is {list(other.shape)}"
        if value.dtype.kind != "f":
            share = float(np.mean(other != value)) if value.size else 0.0
            if share > _FLIPS:
                return name, f"{share:.1%} of them differ"
            continue
        difference = np.abs(other.astype(np.float64) - value).max(initial=0)
        scale = np.abs(value.astype(np.float64)).max(initial=1e-12)
        if not difference <= _TOLERANCE * scale:
            return name, f"they differ by {difference:.2g}, where {scale:.2g} is the largest"
    return None


def _outputs(model: ir.Model, seed: int) -> dict[str, np.ndarray]:
    """Run a copy of the model on noise."""
    import onnxruntime

    copy = attach_references(model.clone())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    text, weights = split_weights(copy)
    options.add_external_initializers(
        list(weights), [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    )
    session = onnxruntime.InferenceSession(text.SerializeToString(), options)
    rng = np.random.default_rng(seed)
    feeds = {value.name: _noise(value, rng) for value in copy.graph.inputs}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _noise(value: ir.Value, rng: np.random.Generator) -> np.ndarray:
    """Noise for an input, for three frames where their number is free; whole numbers are actions."""
    assert value.shape is not None and value.dtype is not None
    shape = [_FRAMES if str(dim) == FRAMES else int(dim) for dim in value.shape]  # type: ignore[arg-type]
    if value.dtype == ir.DataType.FLOAT:
        return rng.standard_normal(shape).astype(np.float32)
    return rng.integers(0, 2 if value.dtype == ir.DataType.BOOL else 3, shape).astype(value.dtype.numpy())
