"""Options of the model families, as plain data (no torch: the zoo lists them at once)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from dvexport.errors import UsageError
from dvexport.video.preprocess import Preprocess

__all__ = [
    "MobileNetConfig",
    "Preprocess",
    "ResNetConfig",
    "Shift",
    "StaSettings",
    "ViTConfig",
    "VideoSwinConfig",
]

Shift = Literal["none", "bidirectional", "online"]
"""TSM: `bidirectional` reads frames t+1 and t-1, `online` only t-1 (other weights, other channels)."""


@dataclass(frozen=True)
class ResNetConfig:
    """Every option of the ResNet family: TSN, TSM, AdaFuse, D-STEP.

    Attributes:
        depth: 18 or 50.
        width: multiplier of every channel count (1.0 is the published model).
        classes: number of labels.
        frames: frames in a clip.
        size: height and width of the input.
        shift: temporal shift (TSM): `online` reads frame t-1, `bidirectional` t-1 and t+1 (clip mode only).
        shift_div: the shift moves 1/`shift_div` of the channels in each direction.
        shift_place: `conv1` shifts the input of conv1 only (official TSM, `--shift_place=blockres`); `block`
            shifts what conv1, policy and downsample see, not the identity skip (`--shift` of AdaFuse and
            D-STEP); `in_place` shifts the identity skip too (official TSM, `--shift_place=block`).
        channel_gates: AdaFuse's channel policy.
        tile_gates: D-STEP's tile mask.
        enabled_stages: stages with gates, 0-based (`--enabled_stages`).
        history: the policy sees the previous frame and may reuse it (`--gate_history`).
        skipping: the policy may skip where it may reuse (False is `--gate_no_skipping`).
        hidden: hidden units of a policy net (`--gate_hidden_dim`).
        hidden_quota: if above 0, hidden units are `hidden_quota // channels` (`--hidden_quota`).
        gate_bn: batch norm between the policy's linear layers (`--gbn`).
        gate_relu: ReLU between them (`--grelu`).
        gate_pool: what a policy sees of each channel of the block's input, its `mean` over the plane or its
            `max` (`--gate_reduce_type`).
        shared_policies: blocks of equal shape share the linear layers (`--shared_policy_net`).
        semantics: D-STEP as its `code` (the policy sees x, and training leaves conv1's output unmasked)
            or its `paper` (the policy sees x under the tile mask, which applies in training too).
        sampling: `argmax` decides deterministically; `official` draws from Gumbel-softmax in evaluation
            too, as the published numbers were made.
        tau: temperature of the Gumbel relaxations, in training.
        dropout: before the classifier, in training.
    """

    depth: Literal[18, 50] = 18
    width: float = 1.0
    classes: int = 174
    frames: int = 8
    size: tuple[int, int] = (224, 224)
    shift: Shift = "none"
    shift_div: int = 8
    shift_place: Literal["conv1", "block", "in_place"] = "conv1"
    channel_gates: bool = False
    tile_gates: bool = False
    enabled_stages: tuple[int, ...] = (0, 1, 2, 3)
    history: bool = True
    skipping: bool = True
    hidden: int = 1024
    hidden_quota: int = 0
    gate_bn: bool = True
    gate_relu: bool = True
    gate_pool: Literal["mean", "max"] = "mean"
    shared_policies: bool = False
    semantics: Literal["code", "paper"] = "code"
    sampling: Literal["argmax", "official"] = "argmax"
    tau: float = 0.67
    dropout: float = 0.5

    def __post_init__(self) -> None:
        _check_ranges(self)

    @property
    def actions(self) -> tuple[int, ...]:
        """The actions (0 skip, 1 reuse, 2 compute) in the order of the policy's outputs."""
        if not self.history:
            return (0, 2)
        return (0, 1, 2) if self.skipping else (1, 2)

    @property
    def causal(self) -> bool:
        """Whether no frame depends on a later one."""
        return self.shift != "bidirectional"

    def policy_hidden(self, channels: int) -> int:
        """Return the hidden units of the policy of a gate with `channels` channels."""
        return self.hidden_quota // channels if self.hidden_quota else self.hidden


@dataclass(frozen=True)
class MobileNetConfig:
    """Options of MobileNetV2 as TSM.

    Attributes:
        width: multiplier of the channel counts (the stem stays at 32).
        classes: number of labels.
        frames: frames in a clip.
        size: height and width of the input.
        shift: temporal shift (TSM): `online` reads frame t-1, `bidirectional` t-1 and t+1 (clip mode only).
        shift_div: the shift moves 1/`shift_div` of the channels in each direction.
        dropout: before the classifier, in training.
    """

    width: float = 1.0
    classes: int = 27
    frames: int = 8
    size: tuple[int, int] = (224, 224)
    shift: Shift = "none"
    shift_div: int = 8
    dropout: float = 0.5

    def __post_init__(self) -> None:
        _check_ranges(self)

    @property
    def causal(self) -> bool:
        """Whether no frame depends on a later one."""
        return self.shift != "bidirectional"


@dataclass(frozen=True)
class StaSettings:
    """How STA prunes the tokens of a plain transformer (defaults: the paper's, for 8 frames of tokens).

    Attributes:
        r: tokens that each group drops each time; 0 prunes nothing.
        groups: groups of adjacent frames at each pruning; later ones join the survivors of earlier ones.
        stages: blocks after which tokens are pruned, 0-based; empty: 0, a third and two thirds of all.
        direction: `forward` or `reverse` in time, for each pruning.
        method: `sta`, or `random` for the same number of tokens dropped at random, the baseline.
        seed: the seed of the random choice.
    """

    r: int = 0
    groups: tuple[int, ...] = (8, 4, 2)
    stages: tuple[int, ...] = ()
    direction: tuple[str, ...] = ("forward", "reverse", "forward")
    method: Literal["sta", "random"] = "sta"
    seed: int = 0


@dataclass(frozen=True)
class ViTConfig:
    """Options of the plain video transformer, VideoMAE's ViT. Options `sta_*` are also written `sta.*`.

    Attributes:
        depth: number of blocks.
        embed_dim: channels of a token.
        heads: attention heads; no shape of the weights tells them.
        mlp_ratio: hidden units of the MLPs, in multiples of `embed_dim`.
        patch: height and width of a tubelet, in pixels.
        tubelet: frames of a tubelet.
        classes: number of labels.
        frames: frames in a clip.
        size: height and width of the input.
        norm_eps: epsilon of the layer norms in the blocks.
        head_eps: epsilon of the layer norm before the classifier.
        mean_pooling: classify the mean of the tokens, not the first token.
        drop_path: rate of stochastic depth in the last block, in training; earlier blocks have less.
        dropout: before the classifier, in training.
        views: how frames are taken from a video: `one`, one clip over all of it, or `kinetics`, the clips and
            crops of the official test on Kinetics-400, averaged.
        sta_r, sta_groups, sta_stages, sta_direction, sta_method, sta_seed: see `StaSettings`.
    """

    depth: int = 12
    embed_dim: int = 384
    heads: int = 6
    mlp_ratio: float = 4.0
    patch: int = 16
    tubelet: int = 2
    classes: int = 400
    frames: int = 16
    size: tuple[int, int] = (224, 224)
    norm_eps: float = 1e-6
    head_eps: float = 1e-6
    mean_pooling: bool = True
    drop_path: float = 0.0
    dropout: float = 0.0
    views: Literal["one", "kinetics"] = "one"
    sta_r: int = 0
    sta_groups: tuple[int, ...] = (8, 4, 2)
    sta_stages: tuple[int, ...] = ()
    sta_direction: tuple[str, ...] = ("forward", "reverse", "forward")
    sta_method: Literal["sta", "random"] = "sta"
    sta_seed: int = 0

    def __post_init__(self) -> None:
        _check_ranges(self)
        if self.embed_dim % self.heads:
            raise UsageError(f"embed_dim={self.embed_dim} is not a multiple of heads={self.heads}")
        if self.frames % self.tubelet:
            raise UsageError(f"frames={self.frames} are not whole tubelets of {self.tubelet} frames")
        if self.size[0] % self.patch or self.size[1] % self.patch:
            raise UsageError(f"size={self.size[0]}x{self.size[1]} is not whole patches of {self.patch} pixels")

    @property
    def causal(self) -> bool:
        """Every token sees the whole clip."""
        return False

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens in time, height and width."""
        return self.frames // self.tubelet, self.size[0] // self.patch, self.size[1] // self.patch

    @property
    def tokens(self) -> int:
        """Tokens of a clip."""
        return math.prod(self.grid)

    @property
    def sta(self) -> StaSettings:
        """The options of the token pruning."""
        return StaSettings(**{f.name: getattr(self, f"sta_{f.name}") for f in dataclasses.fields(StaSettings)})


@dataclass(frozen=True)
class VideoSwinConfig:
    """Options of Video-Swin.

    Attributes:
        embed_dim: channels of the first stage; each further one has twice as many.
        depths: blocks of each stage.
        heads: attention heads of each stage.
        patch: frames, height and width of a patch.
        window: tokens of a window in time, height and width.
        mlp_ratio: hidden units of the MLPs, in multiples of the channels.
        classes: number of labels.
        frames: frames in a clip.
        size: height and width of the input.
        drop_path: rate of stochastic depth in the last block, in training; earlier blocks have less.
        dropout: before the classifier, in training.
        views: how frames are taken from a video: `one`, one clip over all of it, or `kinetics`, the clips and
            crops of the official test on Kinetics-400, averaged.
        sta_r: tokens that each frame drops before stage 2, see `dvexport.models.networks.video_swin`; 0 drops none.
        sta_method, sta_seed: see `StaSettings`.
    """

    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    patch: tuple[int, int, int] = (2, 4, 4)
    window: tuple[int, int, int] = (8, 7, 7)
    mlp_ratio: float = 4.0
    classes: int = 400
    frames: int = 32
    size: tuple[int, int] = (224, 224)
    drop_path: float = 0.0
    dropout: float = 0.0
    views: Literal["one", "kinetics"] = "one"
    sta_r: int = 0
    sta_method: Literal["sta", "random"] = "sta"
    sta_seed: int = 0

    def __post_init__(self) -> None:
        _check_ranges(self)
        if len(self.depths) != 4 or len(self.heads) != 4:
            raise UsageError(f"depths={self.depths} and heads={self.heads} need a number for each of 4 stages")
        for stage, heads in enumerate(self.heads):
            if self.embed_dim * 2**stage % heads:
                raise UsageError(f"stage {stage + 1} has {self.embed_dim * 2**stage} channels, not whole {heads} heads")
        if self.frames % self.patch[0]:
            raise UsageError(f"frames={self.frames} are not whole patches of {self.patch[0]} frames")

    @property
    def causal(self) -> bool:
        """Every token may see later frames."""
        return False

    def stage_size(self, stage: int) -> tuple[int, int, int]:
        """Return the tokens of a stage (0-based) in time, height and width."""
        height, width = (-(-side // patch) for side, patch in zip(self.size, self.patch[1:], strict=True))
        return self.frames // self.patch[0], -(-height // 2**stage), -(-width // 2**stage)


_COUNT = "more is no model that a machine can hold"
_RANGES: dict[str, tuple[float, float, str]] = {
    "width": (0.01, 16, _COUNT),
    "classes": (1, 1_000_000, _COUNT),
    "frames": (1, 4096, "more is no clip that fits into memory"),
    "size": (1, 8192, "more is no picture of a video"),
    "shift_div": (2, 1024, "a shift moves a share of the channels in each direction, at most half"),
    "hidden": (1, 1_000_000, "a policy net needs hidden units"),
    "hidden_quota": (0, 1_000_000_000, _COUNT),
    "enabled_stages": (0, 3, "ResNet has four stages"),
    "tau": (1e-6, 1e6, "it divides scores"),
    "dropout": (0, 0.99, "a rate"),
    "drop_path": (0, 0.99, "a rate"),
    "depth": (1, 1000, _COUNT),
    "depths": (1, 1000, _COUNT),
    "embed_dim": (1, 65_536, _COUNT),
    "heads": (1, 4096, _COUNT),
    "mlp_ratio": (1e-3, 64, _COUNT),
    "patch": (1, 1024, "more is no part of a picture"),
    "tubelet": (1, 1024, "more is no part of a clip"),
    "window": (1, 1024, "more is no part of a clip"),
    "norm_eps": (1e-30, 1, "it keeps a norm from dividing by zero"),
    "head_eps": (1e-30, 1, "it keeps a norm from dividing by zero"),
    "sta_r": (0, 1_000_000, "0 prunes nothing"),
    "sta_groups": (1, 4096, "frames are joined to groups"),
    "sta_stages": (0, 999, "they are blocks, counted from 0"),
    "sta_seed": (0, 2**63 - 1, "seeds are such numbers"),
}
"""From which to which number an option goes, both included, and why; of options with several, each of them."""


def _check_ranges(config: Any) -> None:
    """Raise UsageError for an option of a config that is out of its range."""
    for option in dataclasses.fields(config):
        if option.name not in _RANGES:
            continue
        least, most, why = _RANGES[option.name]
        value = getattr(config, option.name)
        if not all(least <= each <= most for each in (value if isinstance(value, tuple) else (value,))):
            raise UsageError(
                f"{option.name.replace('sta_', 'sta.')}={_shown(value)} is out of range",
                why=f"it goes from {least:,} to {most:,}: {why}".replace(",", " "),
            )


def _shown(value: Any) -> str:
    text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
