"""The static ResNets that every runtime is given, and forced decisions at a budget of FLOPs."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from benchmarks.forced import decisions
from dvexport.decisions import FORCED, decision_key
from dvexport.dialect.flops import FlopTable
from dvexport.export import build_model

if TYPE_CHECKING:
    import torch

__all__ = ["SIZE", "budget", "executed", "frame", "plain_module", "plain_onnx", "write_static"]

SIZE = (224, 224)
_STEPS = 12
"""Halvings in the search for a rate: the smallest gate has fewer cells than that tells apart."""


def plain_module(name: str) -> torch.nn.Module:
    """Return a TSN of the zoo frame by frame, without its consensus: a plain ResNet, weights drawn with seed 0."""
    import torch

    class PerFrame(torch.nn.Module):
        """The network alone."""

        def __init__(self) -> None:
            super().__init__()
            self.model = build_model(name, None, {}).model

        def forward(self, frame: torch.Tensor) -> torch.Tensor:
            """Return the frame's logits."""
            return self.model.per_frame_logits(frame)

    return PerFrame().eval()


def plain_onnx(module: torch.nn.Module) -> ir.Model:
    """Return a module as torch's own exporter writes it."""
    import torch

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        program = torch.onnx.export(module, (torch.zeros(1, 3, *SIZE),), dynamo=True, verbose=False)
    assert program is not None
    return program.model


def write_static(name: str, folder: Path) -> None:
    """Write a network in the forms of `adapters.py`, with a frame and the logits that PyTorch gives for it."""
    import torch

    module, x = plain_module(name), torch.from_numpy(frame())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.save(folder / "input.npy", x.numpy())
        np.save(folder / "want.npy", module(x).numpy())
        torch.export.save(torch.export.export(module, (x,)), folder / "model.pt2")
        torch.jit.trace(module, x).save(str(folder / "model.pt"))
    ir.save(plain_onnx(module), str(folder / "model.onnx"))


def frame() -> np.ndarray:
    """Return one frame of noise."""
    return np.random.default_rng(1).standard_normal((1, 3, *SIZE)).astype(np.float32)


def executed(table: FlopTable, feeds: Mapping[str, np.ndarray]) -> float:
    """Fraction of the dense MACs that forced decisions ask for, policies left out."""
    one = {decision_key(name, FORCED): value for name, value in feeds.items()}
    return (table.executed([one]).frames[0] - table.decisions) / table.dense  # type: ignore[list-item]


def budget(
    forced: ir.Model, table: FlopTable, share: float, kinds: tuple[str, ...] = ("tiles", "channels")
) -> dict[str, np.ndarray]:
    """Return forced decisions that ask for `share` of the dense MACs, the same rate for each of `kinds`."""

    def drawn(rate: float) -> dict[str, np.ndarray]:
        return decisions(forced, **dict.fromkeys(kinds, rate))

    return drawn(_solve(lambda rate: executed(table, drawn(rate)), share))


def _solve(of: Callable[[float], float], wanted: float) -> float:
    """Return the rate in 0..1 at which a function that rises in steps is nearest to a value, by halving."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if of(middle) < wanted else (low, middle)
    return min(low, high, key=lambda rate: abs(of(rate) - wanted))
