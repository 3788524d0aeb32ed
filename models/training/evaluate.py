"""Accuracy and executed work of a model over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dvexport import gates
from dvexport.models.base import VideoModel
from dvexport.models.networks.policies import Decision, executed_macs
from dvexport.models.training.motion import MotionDataset

__all__ = ["Evaluation", "GateShares", "batches", "clip_logits", "decisions_of", "dense_macs", "evaluate", "normalised"]


@dataclass(frozen=True)
class GateShares:
    """Mean decisions of a gate: shares of its channels per action, and of its tiles that are active."""

    skip: float
    reuse: float
    compute: float
    tiles: float
    executed: float
    """Share of the block's MACs that were executed."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        predictions, labels: class indices per clip, in the order of the data.
        dense_gmacs: per frame, with everything computed.
        executed_gmacs: per frame, as the gates asked for (equal to `dense_gmacs` without gates).
        gates: by gate name.
    """

    predictions: list[int]
    labels: list[int]
    dense_gmacs: float
    executed_gmacs: float
    gates: dict[str, GateShares] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Share of the clips whose class was predicted."""
        hits = sum(p == label for p, label in zip(self.predictions, self.labels, strict=True))
        return hits / len(self.labels)

    def mean_shares(self) -> GateShares | None:
        """Return the plain mean over the gates, None without gates."""
        if not self.gates:
            return None
        rows = torch.tensor([list(vars(shares).values()) for shares in self.gates.values()])
        return GateShares(*rows.mean(0).tolist())


def normalised(frames: Tensor, model: VideoModel) -> Tensor:
    """Return uint8 clips `[B, T, 3, H, W]` as the model takes them: float `[B*T, 3, H, W]`."""
    mean = torch.tensor(model.preprocess.mean, device=frames.device).view(3, 1, 1)
    std = torch.tensor(model.preprocess.std, device=frames.device).view(3, 1, 1)
    return (frames.flatten(0, 1).float() / 255 - mean) / std


def clip_logits(model: VideoModel, x: Tensor, frames: int) -> Tensor:
    """Return logits `[B, classes]` of clips `[B*T, 3, H, W]` of T = `frames`, under `gates.frames_per_clip(T)`.

    A whole-clip model returns just them; any other has the consensus of a clip in its last frame's row.
    """
    logits: Tensor = model(x)
    return logits if model.whole_clip else logits[frames - 1 :: frames]


def batches(indices: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Yield `indices` in lists of `batch`; the last may be shorter."""
    for start in range(0, len(indices), batch):
        yield list(indices[start : start + batch])


@torch.no_grad()
def evaluate(
    model: VideoModel,
    dataset: MotionDataset,
    *,
    indices: Sequence[int] | None = None,
    batch: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Run `model` in evaluation mode over `dataset`, on the device where the model is.

    Args:
        model: its mode is restored afterwards.
        dataset: with the frame size and count of the model.
        indices: which clips; all by default.
        batch: clips at a time.
        progress: called with (clips done, clips in all).
    """
    device = next(model.parameters()).device
    chosen = range(len(dataset)) if indices is None else indices
    training = model.training
    model.eval()
    dense = dense_macs(model, (dataset.size, dataset.size))
    predictions: list[int] = []
    labels: list[int] = []
    tally = _Tally()
    for part in batches(chosen, batch):
        frames, truth = dataset.batch(part, device)
        with gates.frames_per_clip(dataset.frames):
            logits = clip_logits(model, normalised(frames, model), dataset.frames)
            tally.add(decisions_of(model))
        predictions += logits.argmax(1).tolist()
        labels += truth.tolist()
        progress(len(labels), len(chosen))
    model.train(training)
    saved = tally.saved_macs()
    return Evaluation(predictions, labels, dense / 1e9, (dense - saved) / 1e9, tally.shares())


def decisions_of(model: VideoModel) -> list[Decision]:
    """Return what the model's gates decided last; nothing for a model without gates."""
    decisions: Callable[[], list[Decision]] | None = getattr(model, "decisions", None)
    return decisions() if decisions is not None else []


class _Tally:
    """Sums of decisions over batches, per gate: frames, skip, reuse, compute, tiles, executed MACs."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.macs: dict[str, int] = {}

    def add(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            executed = executed_macs(decision)
            hot, tiles = decision.one_hot, decision.tiles
            actions = hot.mean(1).sum(0) if hot is not None else executed.new_tensor([0, 0, len(executed)])
            active = tiles.float().mean((1, 2)).sum() if tiles is not None else executed.new_tensor(len(executed))
            row = torch.stack([executed.new_tensor(len(executed)), *actions, active, executed.sum()]).double()
            self.sums[decision.gate] = self.sums.get(decision.gate, torch.zeros_like(row)) + row
            self.macs[decision.gate] = sum(decision.macs)

    def shares(self) -> dict[str, GateShares]:
        found = {}
        for gate, row in self.sums.items():
            skip, reuse, compute, tiles, executed = (row[1:] / row[0]).tolist()
            found[gate] = GateShares(skip, reuse, compute, tiles, executed / self.macs[gate])
        return found

    def saved_macs(self) -> float:
        """Return the MACs per frame that the gates saved."""
        return sum(self.macs[gate] - float(row[5] / row[0]) for gate, row in self.sums.items())


@torch.no_grad()
def dense_macs(model: VideoModel, size: tuple[int, int]) -> int:
    """Return the MACs of one frame of `size` if everything is computed: convolutions and linear layers."""
    total = 0

    def count(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, Tensor)
        total += weight.numel() * (output[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1)

    if model.whole_clip:
        return _whole_clip_macs(model, size)
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    training = model.training
    try:
        model.eval()(torch.zeros(1, 3, *size, device=next(model.parameters()).device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return total


def _whole_clip_macs(model: VideoModel, size: tuple[int, int]) -> int:
    """Return the MACs per frame of a model that reads a clip as one, products within attention included."""
    from torch.utils.flop_counter import FlopCounterMode

    frames = model.preprocess.frames
    training = model.training
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            model.eval()(torch.zeros(frames, 3, *size, device=next(model.parameters()).device))
    finally:
        model.train(training)
    return int(counter.get_total_flops()) // 2 // frames
