"""A procedural video data set whose classes differ by motion alone.

A textured object moves, turns or changes size over a drifting background. Every clip visits the
same equally spaced steps of its motion, whatever the class: forward, backward, or there and back
are three orders of one set of frames. A motion that a class does not show is held at a random one
of its steps. So a frame taken at random from a clip has the same distribution in every class, and
a model that looks at frames one by one has nothing to tell them by (there is no motion blur for
the same reason). Camera drift, light, textures, shapes and noise do not depend on the class.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dvexport.errors import UsageError, unknown_name
from dvexport.models.training.textures import Draws, noise, painted, square_grid, star_distance

__all__ = ["CLASSES", "SPLITS", "MotionDataset", "Scene", "mirror_images", "motion_order", "write_sample_clips"]

_PROGRAMS = {
    "move_left": ("x", "backward"),
    "move_right": ("x", "forward"),
    "move_up": ("y", "backward"),
    "move_down": ("y", "forward"),
    "rotate_clockwise": ("angle", "forward"),
    "rotate_counterclockwise": ("angle", "backward"),
    "approach": ("scale", "forward"),
    "recede": ("scale", "backward"),
    "shake": ("x", "there_and_back"),
    "nod": ("y", "there_and_back"),
    "wobble": ("angle", "there_and_back"),
    "hold": ("none", "forward"),
}
_PROPERTIES = ("x", "y", "angle", "scale")

CLASSES = tuple(_PROGRAMS)
"""The labels, in the order of the class index."""

SPLITS = {"train": 2**20, "validation": 1536, "test": 1200}
"""Clips of each split; a clip of one split is in no other."""

_MIRRORED = {
    "across": ("move_left", "move_right"),
    "upside_down": ("move_up", "move_down"),
    "turning": ("rotate_clockwise", "rotate_counterclockwise"),
    "size": ("approach", "recede"),
}
_MIRRORS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (1, ("across", "upside_down", "turning", "size")),  # frames in reverse
    (3, ("upside_down", "turning")),  # rows upside down
    (4, ("across", "turning")),  # columns left to right
)

_CANVAS = 1.7  # the background reaches this far beyond the frame, which spans [-1, 1]
_OBJECT = 1.6  # extent of the object's canvas, in object radii


def motion_order(order: str, frames: int, phase: int = 0) -> Tensor:
    """Return the step, 0 to frames-1, shown at each frame: always a permutation.

    Args:
        order: `forward`, `backward` or `there_and_back` (the even steps up, the odd ones down).
        frames: how many.
        phase: where an oscillation begins.
    """
    steps = torch.arange(frames)
    if order == "forward":
        return steps
    if order == "backward":
        return steps.flip(0)
    if order != "there_and_back":
        raise unknown_name("motion order", order, ("forward", "backward", "there_and_back"))
    return torch.cat([steps[::2], steps[1::2].flip(0)]).roll(phase)


def mirror_images(frames: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return clips with all their mirror images in time, height and width, each with the class it then shows.

    The eight share every pixel, so that nothing but motion tells their classes apart.

    Args:
        frames: `[B, T, 3, H, W]`.
        labels: `[B]`.

    Returns:
        `[8 B, T, 3, H, W]` and `[8 B]`; the first B are those given.
    """
    for axis, pairs in _MIRRORS:
        frames = torch.cat([frames, frames.flip(axis)])
        labels = torch.cat([labels, _mirrored_classes(pairs).to(labels.device)[labels]])
    return frames, labels


def _mirrored_classes(pairs: tuple[str, ...]) -> Tensor:
    """Return for each class the one that takes its place when `pairs` of opposite motions change places."""
    order = list(range(len(CLASSES)))
    for name in pairs:
        first, second = (CLASSES.index(label) for label in _MIRRORED[name])
        order[first], order[second] = second, first
    return torch.tensor(order)


@dataclass(frozen=True)
class Scene:
    """Where everything is in each frame of a batch of clips, on the CPU.

    `steps` holds, for x, y, angle and scale, the step 0..T-1 of that motion: `[B, 4, T]`.
    The others are `[B, T]`: position and radius in half frames, angle in radians (clockwise),
    and the camera's position over the background.
    """

    labels: Tensor
    steps: Tensor
    x: Tensor
    y: Tensor
    angle: Tensor
    radius: Tensor
    camera_x: Tensor
    camera_y: Tensor


class MotionDataset:
    """Clips generated on demand; a clip depends on (seed, split, index) alone.

    Args:
        split: `train`, `validation` or `test`.
        size: height and width in pixels; another size shows the same scenes.
        frames: T, of a motion that lasts the whole clip; another T samples the same paths.
        seed: the seed of the whole data set.

    Attributes:
        drift: share of the camera's motion over the background that is shown; 1, but in the beginning of
            some trainings.

    Raises:
        UsageError: unknown split, or a size or frame count too small to show a motion.
    """

    labels = CLASSES

    def __init__(self, split: str, size: int = 160, frames: int = 8, seed: int = 0) -> None:
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        if size < 16 or frames < 3:
            raise UsageError(
                f"a motion cannot be shown in {frames} frames of {size} pixels",
                hint="use at least 3 frames of at least 16 pixels",
            )
        self.split, self.size, self.frames, self.seed = split, size, frames, seed
        self.drift = 1.0

    def __len__(self) -> int:
        return SPLITS[self.split]

    def clip(self, index: int) -> tuple[Tensor, int]:
        """Return clip `index` as uint8 RGB frames `[T, 3, size, size]`, and its label."""
        frames, labels = self.batch([index], "cpu")
        return frames[0], int(labels[0])

    def batch(self, indices: list[int] | Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return uint8 RGB frames `[B, T, 3, size, size]` and labels `[B]`, rendered on `device`.

        Labels and scenes are the same on every device; a pixel may differ by one level.

        Raises:
            UsageError: an index outside the split.
        """
        indices = torch.as_tensor(indices, dtype=torch.int64)
        draws = self._draws(indices)
        scene = self.scene(indices)
        frames = _render(draws.to(device), scene, self.size, torch.device(device))
        return frames, scene.labels.to(device)

    def scene(self, indices: list[int] | Tensor) -> Scene:
        """Return the motion of the clips `indices`, without rendering them."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        draws, total = self._draws(indices), self.frames
        labels = indices % len(CLASSES)
        held = (draws("held", len(_PROPERTIES)) * total).long()
        phases = (draws("phase") * total).long()
        steps = held[..., None].expand(-1, -1, total).clone()
        for row, label in enumerate(labels.tolist()):
            moving, order = _PROGRAMS[CLASSES[label]]
            if moving != "none":
                steps[row, _PROPERTIES.index(moving)] = motion_order(order, total, int(phases[row]))
        # Offsets from -1/2 to 1/2 of the travel, the same set for all classes.
        offset = steps / (total - 1) - 0.5
        shiver = draws("shiver", 2, total, low=-0.01, high=0.01)
        x = draws("x", 1, low=-0.35, high=0.35) + draws("x.travel", 1, low=0.45, high=0.9) * offset[:, 0]
        y = draws("y", 1, low=-0.35, high=0.35) + draws("y.travel", 1, low=0.45, high=0.9) * offset[:, 1]
        turn = draws("turn", 1, low=1.2, high=2.8) * offset[:, 2]
        growth = draws("growth", 1, low=0.45, high=0.85) * offset[:, 3]
        time = torch.linspace(-0.5, 0.5, total)
        drift = draws("drift", 2, 1, low=-0.5, high=0.5) * time
        return Scene(
            labels=labels,
            steps=steps,
            x=x + shiver[:, 0],
            y=y + shiver[:, 1],
            angle=draws("angle", 1, high=6.2831853) + turn,
            radius=draws("radius", 1, low=0.38, high=0.56) * growth.exp(),
            camera_x=self.drift * (drift[:, 0] + draws("camera.x", total, low=-0.006, high=0.006)),
            camera_y=self.drift * (drift[:, 1] + draws("camera.y", total, low=-0.006, high=0.006)),
        )

    def _draws(self, indices: Tensor) -> Draws:
        outside = indices[(indices < 0) | (indices >= len(self))]
        if len(outside):
            raise UsageError(f"clip {int(outside[0])} is not in split '{self.split}'", hint=f"0 to {len(self) - 1}")
        start = sum(list(SPLITS.values())[: list(SPLITS).index(self.split)])
        return Draws(self.seed, indices + start)


def _render(draws: Draws, scene: Scene, size: int, device: torch.device) -> Tensor:
    """Return uint8 frames `[B, T, 3, size, size]`."""
    grid = square_grid(size, 1.0, device)
    pose = {
        name: getattr(scene, name).to(device)[..., None, None]
        for name in ("x", "y", "angle", "radius", "camera_x", "camera_y")
    }
    camera = torch.stack([pose["camera_x"], pose["camera_y"]], dim=-1)
    image = _sample(_background(draws, size), (grid + camera) / _CANVAS, "reflection")
    canvas = _object(draws, size)
    lift = draws("shadow", 2, low=0.03, high=0.14)
    shade = lift[:, None, :, None, None]
    shadow = _sample(canvas[:, 4:], _object_points(grid, pose, shade[:, :, 0], shade[:, :, 1]), "zeros")
    sprite = _sample(canvas[:, :4], _object_points(grid, pose, 0.0, 0.0), "zeros")
    image = image * (1 - 0.55 * shadow)
    image = torch.lerp(image, sprite[:, :, :3], sprite[:, :, 3:])
    image = image * _light(draws, grid, scene.x.shape[1])
    image = image + _sensor_noise(draws, image.shape[1], size)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def _sample(canvas: Tensor, points: Tensor, padding: str) -> Tensor:
    """Sample `[B, C, h, w]` at `[B, T, H, W, 2]` (in [-1, 1]); returns `[B, T, C, H, W]`."""
    batch, total, height, width, _ = points.shape
    flat = points.reshape(batch, total * height, width, 2)
    picked = F.grid_sample(canvas, flat, mode="bilinear", padding_mode=padding, align_corners=False)
    return picked.reshape(batch, -1, total, height, width).transpose(1, 2)


def _object_points(grid: Tensor, pose: dict[str, Tensor], dx: Tensor | float, dy: Tensor | float) -> Tensor:
    """Return the object's canvas coordinates of the frame's pixels, `[B, T, H, W, 2]`."""
    x, y = grid[..., 0] - pose["x"] - dx, grid[..., 1] - pose["y"] - dy
    cos, sin = torch.cos(pose["angle"]), torch.sin(pose["angle"])
    along, across = x * cos + y * sin, y * cos - x * sin
    return torch.stack([along, across], dim=-1) / (pose["radius"] * _OBJECT)[..., None]


def _background(draws: Draws, size: int) -> Tensor:
    """Return the scene behind, `[B, 3, m, m]`, with three smaller things lying in it."""
    side = round(size * _CANVAS)
    image = painted(draws, "ground", side=side, octaves=(3, 6, 12, 24, 48, 96), chroma=0.16)
    points = square_grid(side, _CANVAS, image.device)
    edge = size / 3
    for thing in ("pebble", "leaf", "crate"):
        centre = draws(f"{thing}.centre", 2, 1, 1, low=-1.2, high=1.2)
        reach = draws(f"{thing}.radius", 1, 1, low=0.1, high=0.24)
        local = torch.stack([points[..., 0] - centre[:, 0], points[..., 1] - centre[:, 1]], dim=-1)
        inside = star_distance(draws, thing, local / reach[..., None])
        alpha = torch.sigmoid(inside * reach * edge)[:, None]
        tint = draws(f"{thing}.lightness", 1, 1, 1, low=0.15, high=0.85)
        tint = tint + draws(f"{thing}.tint", 3, 1, 1, low=-0.2, high=0.2)
        grain = noise(draws, f"{thing}.grain", channels=1, side=side, octaves=(16, 64))
        image = torch.lerp(image, tint * (0.6 + 0.8 * grain), alpha)
    return image.clamp(0, 1)


def _object(draws: Draws, size: int) -> Tensor:
    """Return the object's canvas `[B, 5, m, m]`: colour, outline, and a soft outline for its shadow."""
    side = round(size * 0.9)
    inside = star_distance(draws, "object", square_grid(side, _OBJECT, draws.keys.device))
    colour = painted(draws, "paint", side=side, octaves=(3, 6, 12, 24), chroma=0.3)
    # Darker towards the rim, as a rounded thing looks; the same from every side.
    colour = colour * (0.55 + 0.5 * (inside * 3).clamp(0, 1))[:, None]
    outline = torch.sigmoid(inside * size / 4)[:, None]
    soft = torch.sigmoid(inside * 9)[:, None]
    return torch.cat([colour.clamp(0, 1), outline, soft], dim=1)


def _light(draws: Draws, grid: Tensor, total: int) -> Tensor:
    """Return the brightness `[B, T, 1, H, W]`: a gradient, a vignette and a slow change in time."""
    slope = draws("light.slope", 2, 1, 1, low=-0.15, high=0.15)
    plane = 1 + slope[:, 0] * grid[..., 0] + slope[:, 1] * grid[..., 1]
    vignette = 1 - draws("light.vignette", 1, 1, high=0.12) * (grid**2).sum(-1)
    time = torch.linspace(-0.5, 0.5, total, device=grid.device)
    change = 1 + draws("light.change", 1, low=-0.25, high=0.25) * time
    gain = draws("light.gain", 1, low=0.8, high=1.2) * change
    return (plane * vignette)[:, None, None] * gain[:, :, None, None, None]


def _sensor_noise(draws: Draws, total: int, size: int) -> Tensor:
    """Return grey noise `[B, T, 1, size, size]`, new in every frame, of a level drawn per clip."""
    level = draws("sensor.level", 1, 1, 1, 1, low=0.01, high=0.05)
    return level * draws("sensor", total, 1, size, size, low=-1, high=1)


def write_sample_clips(
    folder: Path, indices: dict[str, int] | None = None, *, size: int = 224, frames: int = 32, rate: int = 16
) -> list[Path]:
    """Write one clip a class from the test split as `folder/CLASS.mp4` (H.264), and return the paths.

    Args:
        folder: created when missing.
        indices: the clip of each class; by default the first of the split.
        size, frames, rate: what the video has; the scenes are those of the data set at its own size.

    Raises:
        UsageError: an index whose clip is of another class, or a folder that can't be written.
    """
    from dvexport.video.clips import write_clip

    dataset = MotionDataset("test", size=size, frames=frames)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for label, name in enumerate(CLASSES):
        clip, found = dataset.clip((indices or {}).get(name, label))
        if found != label:
            raise UsageError(f"test clip chosen for '{name}' is of class '{CLASSES[found]}'")
        path = folder / f"{name}.mp4"
        write_clip(path, clip.permute(0, 2, 3, 1).numpy(), rate)
        written.append(path)
    return written
