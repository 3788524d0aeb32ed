"""Training of the zoo's models by recipe: resumable, the same on every run on the same device.

An epoch is a function of the state before it, the recipe and its number: it seeds its own random
draws and reads clips that no other epoch reads. A training that is killed resumes from the last
finished epoch and ends with the weights it would have had. A recipe may start from the weights of
another training.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvexport import gates
from dvexport.errors import UsageError
from dvexport.files import atomic_write
from dvexport.models import zoo
from dvexport.models.base import VideoModel
from dvexport.models.checkpoints.checkpoint import read_checkpoint
from dvexport.models.checkpoints.importers import load_weights
from dvexport.models.networks.policies import ChannelPolicy, TileMask
from dvexport.models.networks.vit import VisionTransformer
from dvexport.models.training import losses
from dvexport.models.training.evaluate import Evaluation, clip_logits, decisions_of, evaluate, normalised
from dvexport.models.training.motion import MotionDataset, mirror_images
from dvexport.models.training.motion_hints import Hints, scale_blocks, whiten_embedding
from dvexport.models.training.recipe import Recipe, load_recipe
from dvexport.models.training.training_state import (
    Files,
    TrainingState,
    find_weights,
    half_precision_weights,
    load_state,
    save_state,
)
from dvexport.video.preprocess import Preprocess

__all__ = ["Trained", "train"]

_SECONDS_BETWEEN_LINES = 30
_HINTS = "hints:"  # begins a state's keys that are no part of the model


@dataclass(frozen=True)
class Trained:
    """The outcome of a training: where the weights are, and how they do on the whole validation split."""

    weights: Path
    curves: Path
    evaluation: Evaluation


def train(
    recipe: str | Path | Recipe,
    *,
    output: Path,
    resume: bool = True,
    device: str | None = None,
    epochs: int | None = None,
    progress: Callable[[str], None] = print,
) -> Trained:
    """Train by `recipe` and write `output/NAME.safetensors`, with its curves and its state beside it.

    Args:
        recipe: a recipe, the name of a shipped one, or a TOML file.
        output: folder, created when missing.
        resume: go on with a training that was stopped in `output`; False begins again.
        device: `cpu`, `cuda`; by default a GPU if there is one.
        epochs: in place of the recipe's.
        progress: gets a line of text after each epoch.

    Raises:
        UsageError: a recipe that does not fit, or a state that another recipe left.
        UsageError: also if the weights to start from are not there.
        CheckpointError: they are of another model, or damaged.
        UsageError: also if the disk is full or the folder not writable (the last saved epoch stays).
    """
    plan = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if epochs is not None:
        plan = plan.with_epochs(epochs)
    run = _Run(plan, _device(device))
    files = Files(Path(output), plan.name)
    state = load_state(files, plan.digest) if resume else None
    if state is not None:
        run.restore(state)
        progress(f"{plan.name}: resumed after epoch {state.epoch} of {plan.optimiser.epochs}")
    elif plan.start_from:
        weights = find_weights(plan.start_from, files.folder)
        run.start_from(weights)
        progress(f"{plan.name}: starts from {weights}")
    _make(files.folder)
    while run.epoch < plan.optimiser.epochs:
        record = run.train_epoch(progress)
        save_state(files, run.state())
        progress(_line(plan, record))
    return _finish(run, files, progress)


def _device(name: str | None) -> torch.device:
    """Return the device called `name`, a GPU if there is one by default; UsageError if it isn't there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise UsageError(f"no device '{name}' here", why=why, hint="cpu, or cuda where there is one") from None
    return device


def _make(folder: Path) -> None:
    """Create `folder` when missing; UsageError if that can't be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError("can't make the output folder", where=str(folder), why=error.strerror) from None


class _Run:
    """A training in progress."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.model = _new_model(recipe).to(device)
        if not self.model.whole_clip:  # that has no layers but linear ones to speak of, and a 3-D kernel
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.data = MotionDataset("train", recipe.data.size, recipe.data.frames, recipe.data.seed)
        self.hints = _hints(self.model, recipe, self.data)
        self.learning = nn.ModuleDict({"model": self.model} | ({"hints": self.hints} if self.hints else {}))
        self.optimiser = _optimiser(self.learning, recipe)
        self.epoch = 0
        self.curves: list[dict[str, Any]] = []

    def start_from(self, weights: Path) -> None:
        """Take the weights of a trained model; CheckpointError if they don't fit this one."""
        load_weights(self.model, read_checkpoint(weights).state, where=str(weights))

    def restore(self, state: TrainingState) -> None:
        """Go back to where `state` was taken."""
        hints = {key: value for key, value in state.model.items() if key.startswith(_HINTS)}
        self.model.load_state_dict({key: value for key, value in state.model.items() if key not in hints})
        if self.hints is not None:
            self.hints.load_state_dict({key.removeprefix(_HINTS): value for key, value in hints.items()})
        self.optimiser.load_state_dict(state.optimiser)
        self.epoch, self.curves = state.epoch, state.curves

    def state(self) -> TrainingState:
        """Return what the training can go on from."""
        hints = self.hints.state_dict(prefix=_HINTS) if self.hints is not None else {}
        model = {**self.model.state_dict(), **hints}
        return TrainingState(self.recipe.digest, self.epoch, model, self.optimiser.state_dict(), self.curves)

    def train_epoch(self, progress: Callable[[str], None]) -> dict[str, Any]:
        """Train one epoch, score it on some validation clips, and return its record.

        Args:
            progress: gets a line now and then while a slow epoch runs.
        """
        began = told = time.monotonic()
        data, batch = self.recipe.data, self.recipe.optimiser.batch
        steps = data.clips_per_epoch // batch
        sums: dict[str, Tensor] = {}
        self.model.train()
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.seed * 100003 + self.epoch)
            self._seed_gates()
            images = 8 if data.mirrored else 1
            for step in range(steps):
                first = (self.epoch * data.clips_per_epoch + step * batch) // images
                # Consecutive clips are independent and balanced: the label is the index mod classes.
                indices = torch.arange(first, first + batch // images) % len(self.data)
                for name, value in self._step(indices, self.epoch + step / steps).items():
                    sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value.detach()
                if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
                    told, loss = time.monotonic(), float(sums["loss"]) / (step + 1)
                    name = f"{self.recipe.name}: epoch {self.epoch + 1}"
                    progress(f"{name}, step {step + 1}/{steps}  loss {loss:.3f}")
        self.epoch += 1
        means = {name: float(total) / steps for name, total in sums.items()}
        if not all(math.isfinite(value) for value in means.values()):
            raise UsageError(
                f"the loss is no longer a number in epoch {self.epoch}",
                where=self.recipe.name,
                hint="lower learning_rate or alpha in the recipe",
            )
        record = {"epoch": self.epoch, **means, **self._score(), "seconds": time.monotonic() - began}
        self.curves.append(record)
        return record

    def _seed_gates(self) -> None:
        seed_sampling: Callable[[int], None] | None = getattr(self.model, "seed_sampling", None)
        if seed_sampling is not None:
            seed_sampling(self.recipe.seed * 100003 + self.epoch)

    def _step(self, indices: Tensor, epoch: float) -> dict[str, Tensor]:
        """Take one optimiser step; return the loss and its parts."""
        options = self.recipe.optimiser
        for group in self.optimiser.param_groups:
            group["lr"] = _learning_rate(self.recipe, epoch)
        helps = self.recipe.transformer
        if helps is not None and helps.still_epochs > 0:
            self.data.drift = min(1.0, max(0.0, epoch / helps.still_epochs - 1))
        frames, labels = self.data.batch(indices, self.device)
        if self.recipe.data.mirrored:
            frames, labels = mirror_images(frames, labels)
        parts = self._losses(frames, labels, epoch)
        if helps is not None and self.hints is not None:
            parts["hints"] = self.hints.loss(self.data, indices, self.recipe.data.mirrored)
            parts["loss"] = parts["loss"] + helps.hints * parts["hints"]
        self.optimiser.zero_grad(set_to_none=True)
        parts["loss"].backward()
        nn.utils.clip_grad_norm_(self.learning.parameters(), options.clip_norm)
        self.optimiser.step()
        return parts

    def _losses(self, frames: Tensor, labels: Tensor, epoch: float) -> dict[str, Tensor]:
        """Return the loss of eq. 3 and its parts."""
        gate_options = self.recipe.gates
        if gate_options is not None:
            _fade_noise(self.model, 1 - _share(epoch, gate_options.noise_until))
        x = normalised(frames, self.model).contiguous(memory_format=torch.channels_last)
        in_half = self.device.type == "cuda" or self.recipe.optimiser.half
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=in_half)
        with gates.frames_per_clip(frames.shape[1]), half:
            logits = clip_logits(self.model, x, frames.shape[1]).float()
            task = F.cross_entropy(logits, labels)
            parts = {
                "loss": task,
                "task": task,
                "train_accuracy": (logits.argmax(1) == labels).float().mean(),
            }
            if gate_options is None:
                return parts
            decisions = decisions_of(self.model)
            fraction = losses.executed_fraction(decisions)
            sparsity = losses.sparsity_loss(fraction, gate_options.target)
            bounds = losses.mask_bounds(
                _share(epoch, gate_options.relax_epochs),
                density=gate_options.density,
                floor=gate_options.floor,
                ceiling=gate_options.ceiling,
            )
            bound = losses.bound_loss(decisions, bounds)
        weight = losses.sparsity_weight(
            epoch, warmup=gate_options.warmup_epochs, alpha=gate_options.alpha, beta=gate_options.beta
        )
        loss = task + weight * sparsity + gate_options.gamma * bound
        return {**parts, "loss": loss, "sparsity": sparsity, "bound": bound, "train_fraction": fraction}

    def _score(self) -> dict[str, Any]:
        data = self.recipe.data
        held_out = MotionDataset("validation", data.size, data.frames, data.seed)
        count = min(data.validation_clips, len(held_out))
        found = evaluate(self.model, held_out, indices=range(count))
        shares = found.mean_shares()
        scores = {"accuracy": found.accuracy, "executed_gmacs": found.executed_gmacs}
        return scores | (vars(shares) if shares is not None else {})


def _new_model(recipe: Recipe) -> VideoModel:
    data = recipe.data
    settings = {**recipe.settings, "classes": len(MotionDataset.labels), "frames": data.frames}
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = zoo.create(recipe.model, size=(data.size, data.size), **settings)
        if recipe.gates is not None:
            _spread_policies(model, recipe.gates.spread)
    model.set_labels(list(MotionDataset.labels))
    model.preprocess = Preprocess(
        size=(data.size, data.size), resize=data.size, frames=data.frames, frame_rate=data.frame_rate
    )
    if recipe.gates is not None and not _has_gates(model):
        raise UsageError(f"'{recipe.model}' has no gates", where=recipe.name, hint="leave out [gates]")
    return model


def _hints(model: VideoModel, recipe: Recipe, data: MotionDataset) -> Hints | None:
    """Give a transformer the start that its recipe asks for; return its hints, None without any."""
    helps = recipe.transformer
    if helps is None:
        return None
    if not isinstance(model, VisionTransformer):
        raise UsageError(f"'{recipe.model}' is no ViT", where=recipe.name, hint="leave out [transformer]")
    if helps.embedding_clips:
        shown = range(len(data) - helps.embedding_clips, len(data))  # the last, which no epoch reaches
        whiten_embedding(model, normalised(data.batch(list(shown), _device_of(model))[0], model))
    scale_blocks(model, helps.gain)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return Hints(model).to(_device_of(model)) if helps.hints else None


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _share(epoch: float, length: float) -> float:
    """Return which share of a phase of `length` epochs is over at `epoch`, 0 to 1."""
    return min(1.0, epoch / length) if length > 0 else 1.0


def _has_gates(model: nn.Module) -> bool:
    """Return whether the model has gates that can be trained."""
    return any(isinstance(module, (ChannelPolicy, TileMask)) for module in model.modules())


@torch.no_grad()
def _spread_policies(model: nn.Module, spread: float) -> None:
    """Draw the policies' output biases from N(0, spread), so that channels begin in different roles."""
    for module in model.modules():
        if isinstance(module, ChannelPolicy):
            module.fc1.bias.normal_(0, spread)


def _fade_noise(model: nn.Module, scale: float) -> None:
    """Scale the noise of the gates' draws; at 0 they are the argmax that evaluation takes."""
    for module in model.modules():
        if isinstance(module, (ChannelPolicy, TileMask)):
            module.noise_scale = max(0.0, scale)


def _optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": recipe.optimiser.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.optimiser.learning_rate)


def _learning_rate(recipe: Recipe, epoch: float) -> float:
    """Return the learning rate at a fractional epoch: linear up, and a cosine down to zero, by default all the way."""
    options = recipe.optimiser
    up = min(1.0, epoch / options.warmup_epochs) if options.warmup_epochs > 0 else 1.0
    length = options.decay_epochs or options.epochs
    down = 0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, epoch - options.epochs + length) / length))
    return options.learning_rate * max(up * down, 1e-4)


def _line(recipe: Recipe, record: dict[str, Any]) -> str:
    """Return an epoch's record as a line of progress."""
    text = (
        f"{recipe.name}: epoch {record['epoch']}/{recipe.optimiser.epochs}"
        f"  loss {record['loss']:.3f}  accuracy {record['accuracy']:.3f}"
        f"  {record['executed_gmacs'] * 1e3:.1f} MMACs/frame"
    )
    if "executed" in record:
        text += (
            f"  gates {record['executed']:.2f} (compute {record['compute']:.2f}, reuse {record['reuse']:.2f},"
            f" skip {record['skip']:.2f}, tiles {record['tiles']:.2f})"
        )
    return f"{text}  {record['seconds']:.0f} s"


def _finish(run: _Run, files: Files, progress: Callable[[str], None]) -> Trained:
    """Round the weights as they are stored, score them on the whole validation split, write them."""
    from safetensors.torch import save

    recipe = run.recipe
    tensors = half_precision_weights(run.model)
    run.model.load_state_dict(tensors, strict=False)  # a shared layer is there once
    data = MotionDataset("validation", recipe.data.size, recipe.data.frames, recipe.data.seed)
    found = evaluate(run.model, data)
    about = {
        "architecture": recipe.model,
        "settings": dataclasses.asdict(run.model.config),
        "preprocess": run.model.preprocess.to_dict(),
        "labels": list(data.labels),
        "recipe": recipe.to_dict(),
        "accuracy": found.accuracy,
        "executed_gmacs": found.executed_gmacs,
        "seed": recipe.seed,
    }
    with atomic_write(files.weights) as path:
        path.write_bytes(save(tensors, metadata={"dvexport": json.dumps(about, sort_keys=True)}))
    progress(
        f"{recipe.name}: accuracy {found.accuracy:.4f} on {len(found.labels)} validation clips,"
        f" {found.executed_gmacs * 1e3:.1f} of {found.dense_gmacs * 1e3:.1f} MMACs/frame -> {files.weights}"
    )
    return Trained(files.weights, files.curves, found)
