"""What shortens the training of a video transformer on the motion data: a start that sees motion, and hints.

From small random weights a transformer learns nothing of motion for a long time: at a width of 96 and weights
from N(0, 0.02) its layers are nearly linear, and between two frames little changes beside what stays.

- **Whitened tubelets.** Half of the embedding's filters begin as principal components of the sum of a
  tubelet's two frames, half as those of their difference, each scaled to unit variance.
- **Gain.** Linear layers in the blocks begin larger, so that GELU and softmax are in their curved part.
- **Hints.** From each token after the last block, a linear layer that is thrown away afterwards tells how much
  of the object lies there, and that times its speed in x, y, angle and scale, which the data set knows.

The model stays a plain one: nothing of this is in the weights that ship.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvexport.models.networks.vit import VisionTransformer
from dvexport.models.training.motion import MotionDataset

__all__ = ["Hints", "object_motion", "scale_blocks", "whiten_embedding"]

_SPEEDS = (0.05, 0.05, 0.13, 0.045)  # typical change from frame to frame: x, y, angle, log scale
# How presence and speeds change sign in reversed time, with rows upside down and with columns swapped.
_SIGNS = ((1, -1, -1, -1, -1), (1, 1, -1, -1, 1), (1, -1, 1, -1, 1))


@torch.no_grad()
def whiten_embedding(model: VisionTransformer, frames: Tensor) -> None:
    """Set the embedding's filters to whitened components of what tubelets of two frames show.

    Args:
        model: with tubelets of 2 frames.
        frames: normalised, `[B*T, 3, H, W]`.
    """
    patch, width = model.config.patch, model.config.embed_dim
    rows, columns = model.config.grid[1:]
    tubelets = frames.reshape(-1, 2, 3, rows, patch, columns, patch).permute(0, 3, 5, 1, 2, 4, 6)
    first, second = tubelets.reshape(-1, 2, 3 * patch * patch).unbind(1)
    filters = torch.zeros(width, 2, 3 * patch * patch, device=frames.device)
    start = 0
    for sign, count in ((1, width - width // 2), (-1, width // 2)):
        mixed = first + sign * second
        mixed = mixed - mixed.mean(0)
        variance, components = torch.linalg.eigh(mixed.T @ mixed / len(mixed))
        strongest = (components / variance.clamp_min(1e-4).sqrt()).T.flip(0)[:count]
        filters[start : start + count] = torch.stack([strongest, sign * strongest], dim=1)[: width - start]
        start += count
    model.patch_embed.proj.weight.copy_(filters.reshape(width, 2, 3, patch, patch).transpose(1, 2))
    assert model.patch_embed.proj.bias is not None
    model.patch_embed.proj.bias.zero_()


@torch.no_grad()
def scale_blocks(model: VisionTransformer, gain: float) -> None:
    """Multiply the linear weights of all blocks: those that read a layer norm by `gain`, the others by 0.6 of it."""
    for name, module in model.blocks.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.mul_(gain if name.endswith(("qkv", "fc1")) else 0.6 * gain)


def object_motion(data: MotionDataset, indices: Tensor, grid: tuple[int, int, int], mirrored: bool) -> Tensor:
    """Return what hints tell of each token, `[B, time, height, width, 5]`: presence, and it times four speeds.

    Args:
        data: where the clips are from.
        indices: the indices of the clips.
        grid: tokens in time, height and width.
        mirrored: for all mirror images, in the order of `motion.mirror_images`: `[8 B, ...]`.
    """
    scene = data.scene(indices)
    span = data.frames // grid[0]

    def middle(value: Tensor) -> Tensor:
        return value.unflatten(1, (grid[0], span)).mean(2)

    def change(value: Tensor) -> Tensor:
        parts = value.unflatten(1, (grid[0], span))
        return (parts[..., -1] - parts[..., 0]) / max(1, span - 1)

    rows, columns = (((torch.arange(count) + 0.5) / count * 2 - 1) for count in grid[1:])
    x, y, radius = (middle(value)[..., None, None] for value in (scene.x, scene.y, scene.radius))
    distance = (columns - x) ** 2 + (rows[:, None] - y) ** 2
    presence = torch.exp(-distance / radius**2)
    moving = (scene.x, scene.y, scene.angle, scene.radius.log())
    speeds = [change(value) / typical for value, typical in zip(moving, _SPEEDS, strict=True)]
    told = presence[..., None] * torch.stack([torch.ones_like(speeds[0]), *speeds], dim=-1)[:, :, None, None]
    if mirrored:
        for axis, signs in enumerate(_SIGNS, start=1):
            told = torch.cat([told, told.flip(axis) * torch.tensor(signs)])
    return told


class Hints(nn.Module):
    """The linear layer that tells hints from the tokens of a model, in training only."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.head = nn.Linear(model.config.embed_dim, 5)
        self.grid = model.config.grid
        self._tokens: Tensor | None = None
        model.norm.register_forward_hook(self._see)

    def _see(self, _module: nn.Module, _args: object, output: Tensor) -> None:
        self._tokens = output if self.training and torch.is_grad_enabled() else None

    def loss(self, data: MotionDataset, indices: Tensor, mirrored: bool) -> Tensor:
        """Return the squared error of the five, summed, on the clips that the model has just read."""
        tokens, self._tokens = self._tokens, None
        assert tokens is not None
        truth = object_motion(data, indices, self.grid, mirrored).to(tokens.device)
        found = self.head(F.layer_norm(tokens.float(), tokens.shape[-1:])).reshape(truth.shape)
        return ((found - truth) ** 2).flatten(0, -2).mean(0).sum()
