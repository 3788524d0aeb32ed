"""Simplify a model with onnxscript's optimizer and onnx-simplifier, and compare the numbers after.

The first folds constants of any size into weights, by `fold_constants`; the second shares and fuses what is left.
Constant folding, dead code and algebraic rules are not this project's business; the comparison is, because
an optimizer that breaks a model must not do so silently.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dvexport.dialect.spec import attach_references
from dvexport.errors import PassError
from dvexport.graph.fold import fold_constants
from dvexport.graph.graph import FRAMES
from dvexport.graph.onnx_simplifier import simplify_graph
from dvexport.graph.weights import split_weights

__all__ = ["Simplify", "SimplifyLowered"]

_TOLERANCE = 1e-4  # of the largest output: batch norms are folded in another order


class Simplify(ir.passes.InPlacePass):
    """Run both optimizers. Requires: gate level, dynamic frame axis. Raises PassError on other numbers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Optimize in place; compare on three frames of noise through the references."""
        before, count = model.clone(), model.graph.num_nodes()
        fold_constants(model)
        simpler = simplify_graph(model)
        if not simpler and _text(model) == _text(before):  # a large model need not run twice
            return ir.passes.PassResult(model, modified=False)
        _compare(before, model)
        return ir.passes.PassResult(model, model.graph.num_nodes() != count)


class SimplifyLowered(ir.passes.InPlacePass):
    """Run onnx-simplifier on standard operators. Raises PassError on other numbers.

    Lowerings write each gate apart, so what several gates compute alike, or what only shapes need, is left over.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Simplify in place; compare on one step of noise."""
        before = model.clone()
        simpler = simplify_graph(model)
        if simpler:
            _compare(before, model)
        return ir.passes.PassResult(model, modified=simpler)


def _compare(before: ir.Model, after: ir.Model) -> None:
    """Raise PassError if the outputs of two models differ."""
    numbers = _outputs(before)
    for name, value in _outputs(after).items():
        was = numbers[name].astype(np.float64)
        difference = float(np.max(np.abs(value - was), initial=0))
        scale = float(np.max(np.abs(was), initial=1e-12))
        if not difference <= _TOLERANCE * scale:
            why = f"they differ by {difference:.2g}, where {scale:.2g} is the largest"
            raise PassError("simplifying changed the model's numbers", where=name, why=why)


def _text(model: ir.Model) -> list[tuple[object, ...]]:
    """Return the graph node by node; values by name, constants as they are held."""
    return [
        (node.domain, node.op_type, [None if v is None else (v.name, id(v.const_value)) for v in node.inputs],
         [v.name for v in node.outputs], {name: str(a.value) for name, a in node.attributes.items()})
        for node in model.graph.all_nodes()
    ]  # fmt: skip


def _outputs(model: ir.Model) -> dict[str, np.ndarray]:
    """Run a copy of the model on three frames of noise."""
    import onnxruntime

    copy = attach_references(model.clone())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    text, weights = split_weights(copy)
    options.add_external_initializers(
        list(weights), [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    )
    session = onnxruntime.InferenceSession(text.SerializeToString(), options)
    rng = np.random.default_rng(0)
    feeds = {value.name: _noise(value, rng) for value in copy.graph.inputs}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _noise(value: ir.Value, rng: np.random.Generator) -> np.ndarray:
    """Three frames of noise for an input; whole numbers are actions."""
    assert value.shape is not None and value.dtype is not None
    shape = [3 if str(dim) == FRAMES else int(dim) for dim in value.shape]  # type: ignore[arg-type]
    if value.dtype == ir.DataType.FLOAT:
        return rng.standard_normal(shape).astype(np.float32)
    return rng.integers(0, 2 if value.dtype == ir.DataType.BOOL else 3, shape).astype(value.dtype.numpy())
