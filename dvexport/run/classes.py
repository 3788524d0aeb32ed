"""What a classifier's logits say: probabilities and names of classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dvexport.ports import Output
from dvexport.run.session import Step

__all__ = ["best_class", "label_of", "logits_output", "probabilities"]


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the softmax of `logits` `[classes]`."""
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    return shifted / shifted.sum()


def label_of(labels: Sequence[str], index: int) -> str:
    """Return the name of a class, its number where it has none."""
    return labels[index] if index < len(labels) else f"class {index}"


def logits_output(outputs: Sequence[Output]) -> Output | None:
    """Return the first output of logits; None for a model that is no classifier."""
    return next((output for output in outputs if output.kind == "logits"), None)


def best_class(step: Step, outputs: Sequence[Output]) -> tuple[str, float] | None:
    """Return the most probable class of a step and its probability; None for a model that is no classifier."""
    output = logits_output(outputs)
    if output is None:
        return None
    chances = probabilities(step.outputs[output.name])
    best = int(chances.argmax())
    return label_of(output.labels, best), float(chances[best])
