"""Outputs that are no numbers: refused, with the first layer that gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dvexport.errors import BundleError

if TYPE_CHECKING:
    import onnx_ir as ir

    from dvexport.bundle.archive import Bundle
    from dvexport.run.feeds import Feeds
    from dvexport.run.session import Step

__all__ = ["check_finite", "first_not_finite"]


def check_finite(bundle: Bundle, step: Step, index: int, feeds: Feeds) -> None:
    """Raise BundleError if an output of a step has NaN or infinite values.

    Args:
        bundle: what the step is of.
        step: what it gave.
        index: its number, for the message.
        feeds: every input of the frame; of a clip, all of its frames.
    """
    wrong = next((name for name, value in step.outputs.items() if not _is_finite(value)), None)
    if wrong is None:
        return
    raise BundleError(
        f"the model gives NaN or infinity, in its output '{wrong}'",
        where=f"{bundle.path}, frame {index}",
        why=_reason(bundle, feeds),
        hint=f"dvexport verify {bundle.path} compares it with the model that it was exported from",
    )


def _reason(bundle: Bundle, feeds: Feeds) -> str:
    from dvexport.bundle.levels import read_gate_level

    try:
        layer = first_not_finite(read_gate_level(bundle), feeds)
    except BundleError as error:  # a slim one, or a damaged level
        return f"which layer does is not told here: {error.what}"
    if layer is None:
        return "the traced model in the bundle gives numbers for this frame: the artifact is not what was exported"
    return f"the first layer that does is {layer}"


def first_not_finite(gate_level: ir.Model, feeds: Feeds) -> str | None:
    """Return the first node of a traced model whose output is not finite on frames, by its place; None if all are.

    Args:
        gate_level: not modified.
        feeds: every input, frames first.
    """
    from dvexport.dialect.spec import attach_references
    from dvexport.graph.graph import fresh_output, source_of
    from dvexport.graph.onnx_file import model_apart
    from dvexport.targets.onnx.runtime import OrtSession

    model = gate_level.clone()
    places: dict[str, str] = {}
    for number, node in enumerate(list(model.graph)):
        for value in node.outputs:
            if value.dtype is not None and value.dtype.is_floating_point():
                name = f"value.{number}.{value.index()}"
                fresh_output(model.graph, name, value)
                places[name] = source_of(node)
    attach_references(model)
    text, weights = model_apart(model)
    values: Mapping[str, np.ndarray] = OrtSession(text, weights=weights).run(dict(feeds))
    return next((place for name, place in places.items() if not _is_finite(values[name])), None)


def _is_finite(value: np.ndarray) -> bool:
    return value.dtype.kind != "f" or bool(np.isfinite(value).all())
