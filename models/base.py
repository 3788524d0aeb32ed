"""What every video model of dvexport offers, so that one pipeline serves them all."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dvexport import gates
from dvexport.errors import UsageError
from dvexport.ports import LOGITS, VIDEO, Output
from dvexport.video.preprocess import Preprocess

__all__ = ["VideoModel", "imagenet_preprocess"]


def imagenet_preprocess(size: tuple[int, int], frames: int, recipe: str | None = None) -> Preprocess:
    """Return the preprocessing of the official checkpoints: RGB, ImageNet's mean, 224 out of 256.

    Args:
        recipe: one of `RECIPES`, to sample a video as the official test does.
    """
    preprocess = Preprocess(
        size=size,
        resize=min(size) * 256 // 224,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        frames=frames,
    )
    return preprocess.with_recipe(recipe) if recipe else preprocess


class VideoModel(nn.Module):
    """A classifier of clips: per-frame logits and their running consensus.

    A subclass defines `per_frame_logits`. Any module becomes one that way, see docs/adding-a-model.md.

    Args:
        name: how the zoo and bundles call the model.
        config: frozen dataclass with every option that shapes the model.
        preprocess: how its frames are made from a video.
        labels: one name per class.
        causal: False if a frame's result depends on later frames, which rules out stream mode.
        whole_clip: the model reads a clip as one: `forward` takes exactly `preprocess.frames` frames a clip
            and returns one row of logits for each clip, `[B, classes]`. It exports in clip mode only.
    """

    def __init__(
        self,
        *,
        name: str,
        config: Any,
        preprocess: Preprocess,
        labels: list[str],
        causal: bool,
        whole_clip: bool = False,
    ) -> None:
        super().__init__()
        if whole_clip and causal:
            raise ValueError("a model that reads a clip as one is not causal")
        self.name = name
        self.config = config
        self.preprocess = preprocess
        self.labels = labels
        self.causal = causal
        self.whole_clip = whole_clip

    def per_frame_logits(self, x: Tensor) -> Tensor:
        """Return logits `[N, classes]` of each frame of `x` `[N, 3, H, W]`, before consensus."""
        raise NotImplementedError

    def forward(self, frames: Tensor) -> Tensor:
        """Return for each frame the consensus over it and all before it.

        Args:
            frames: `[N, 3, H, W]`, one clip, frames first; batches of clips of T frames each
                follow one another under `dvexport.gates.frames_per_clip(T)`.

        Returns:
            `[N, classes]`; the last row of a clip is its result (TSN, average consensus before softmax).
            A model that reads whole clips overrides this and returns one row a clip.
        """
        return gates.frame_mean(self.per_frame_logits(frames))

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one frame of every input, in the order of `forward`: of the video alone."""
        return {VIDEO: (3, *self.preprocess.size)}

    @property
    def declared_outputs(self) -> tuple[Output, ...]:
        """What `forward` gives: logits. A subclass that gives anything else says so here."""
        return (Output(LOGITS, "logits", tuple(self.labels)),)

    import_report: Any = None
    """What an import inferred and assumed (`importers.ImportReport`), None without a checkpoint."""

    def set_labels(self, labels: list[str]) -> None:
        """Name the classes; UsageError if there are more or fewer names than classes."""
        if len(labels) != self.config.classes:
            raise UsageError(f"{len(labels)} labels for a model of {self.config.classes} classes", where=self.name)
        self.labels = list(labels)
