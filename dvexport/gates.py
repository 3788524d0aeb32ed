"""Gates for anyone's torch model: the `dv` dialect as plain functions.

Each function computes in eager mode exactly what its dialect operator specifies
(`dvexport.dialect`), and becomes that operator when the model is traced by
`torch.export`. Shapes are written for one clip, frames first: `[N, C, H, W]`.
Training on batches of clips stacks them along the frame axis (frame fastest) under
`frames_per_clip(T)`, so that history never crosses from one clip into the next. Tokens
of a video transformer are `[B, N, C]`, one row of tokens a clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "COMPUTE",
    "REUSE",
    "SKIP",
    "delay",
    "fold_batch_norm",
    "forced_decisions",
    "frame_mean",
    "frames_per_clip",
    "gated_conv",
    "select_tokens",
    "token_decisions",
    "upsample_tiles",
]

SKIP, REUSE, COMPUTE = 0, 1, 2
"""The actions of an output channel (AdaFuse, section 3; D-STEP, section 3.1)."""

_tokens: ContextVar[tuple[dict[str, Tensor], Mapping[str, Tensor]] | None] = ContextVar("tokens", default=None)

_forced: ContextVar[Callable[[str, str, Tensor], Tensor] | None] = ContextVar("forced", default=None)

_clip_length: ContextVar[int | None] = ContextVar("clip_length", default=None)


@contextmanager
def frames_per_clip(frames: int) -> Iterator[None]:
    """Within this context axis 0 holds clips of `frames` frames each, one after another."""
    token = _clip_length.set(frames)
    try:
        yield
    finally:
        _clip_length.reset(token)


@contextmanager
def token_decisions(follow: Mapping[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
    """Yield what every `select_tokens` within this context chooses, by gate: int64 `[B, keep]`.

    Args:
        follow: choices to go on with in the place of the model's own, which are told all the same. Scores that
            two programs round differently may swap, and all later choices follow from the order: programs are
            compared under the same choices.
    """
    found: dict[str, Tensor] = {}
    token = _tokens.set((found, follow or {}))
    try:
        yield found
    finally:
        _tokens.reset(token)


@contextmanager
def forced_decisions(
    decisions: Mapping[tuple[str, str], Tensor], told: Callable[[str, str, Tensor], None] | None = None
) -> Iterator[None]:
    """Within this context every eager `gated_conv` follows these decisions, and not those it is called with.

    What else a model makes of its own decisions stays its own: `dvexport.forced_eager` lets that follow too.

    Args:
        decisions: by gate and kind, `action` int64 `[N, C]` or `tiles` bool `[N, gh, gw]`. What is not named, or has
            another shape than the model's own, is left as it is.
        told: called with the gate, the kind and the model's own decision at each call that takes one.
    """

    def taken(gate: str, kind: str, own: Tensor) -> Tensor:
        if told is not None:
            told(gate, kind, own)
        given = decisions.get((gate, kind))
        one_hot = kind == "action" and own.is_floating_point()
        return own if given is None or given.shape != (own.shape[:-1] if one_hot else own.shape) else given

    token = _forced.set(taken)
    try:
        yield
    finally:
        _forced.reset(token)


def _by_clip(x: Tensor) -> Tensor:
    """View `[B*T, ...]` as `[B, T, ...]`."""
    frames = _clip_length.get() or x.shape[0]
    return x.reshape(-1, frames, *x.shape[1:])


def delay(x: Tensor, *, name: str) -> Tensor:
    """Return the previous frame's `x`, zeros for the first frame (`dv.Delay`).

    Args:
        x: `[N, ...]`.
        name: names the state that a stream keeps.
    """
    if torch.compiler.is_exporting():
        init = torch.zeros_like(x[:1])
        return torch.onnx.ops.symbolic(
            "dv::Delay", (x, init), attrs={"name": name}, dtype=x.dtype, shape=x.shape, version=1
        )
    clips = _by_clip(x)
    return torch.cat([torch.zeros_like(clips[:, :1]), clips[:, :-1]], dim=1).reshape(x.shape)


def frame_mean(x: Tensor, *, name: str = "consensus") -> Tensor:
    """Return the mean over this frame and all before it, for each frame (`dv.FrameMean`).

    The last row is the consensus over the clip, so a clip and a stream agree frame by frame.

    Args:
        x: `[N, K]`.
        name: names the state that a stream keeps.
    """
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            "dv::FrameMean", (x,), attrs={"name": name}, dtype=x.dtype, shape=x.shape, version=1
        )
    clips = _by_clip(x)
    count = torch.arange(1, clips.shape[1] + 1, dtype=x.dtype, device=x.device)
    return (clips.cumsum(dim=1) / count.view(1, -1, 1)).reshape(x.shape)


def upsample_tiles(tiles: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample a tile mask `[N, gh, gw]` to `[N, 1, *size]`: pixel y reads cell floor(y*gh/height)."""
    rows = torch.arange(size[0], device=tiles.device) * tiles.shape[1] // size[0]
    columns = torch.arange(size[1], device=tiles.device) * tiles.shape[2] // size[1]
    # Traced, this is a Gather along each axis; indexing by brackets would move the frame axis meanwhile.
    return tiles.index_select(1, rows).index_select(2, columns).unsqueeze(1)


def select_tokens(x: Tensor, score: Tensor, keep: int, *, gate: str) -> tuple[Tensor, Tensor]:
    """Keep the `keep` tokens of smallest score, in the order of their scores (`dv.SelectTokens`).

    Args:
        x: `[B, N, C]`.
        score: `[B, N]`, finite; of equal ones the lower index comes first.
        keep: 1 to N, the same for every input, so that all shapes stay static.
        gate: name of the decision, such as `sta.0.3` (call 0, group 3).

    Returns:
        The tokens `[B, keep, C]`, and their places int64 `[B, keep]` on the token axis of `x`.
    """
    if torch.compiler.is_exporting():
        kept, index = torch.onnx.ops.symbolic_multi_out(
            "dv::SelectTokens",
            (x, score),
            attrs={"keep": keep, "gate": gate},
            dtypes=(x.dtype, torch.int64),
            shapes=((x.shape[0], keep, x.shape[2]), (x.shape[0], keep)),
            version=1,
        )
        return kept, index
    if not 1 <= keep <= x.shape[1]:
        raise ValueError(f"gate {gate} keeps {keep} of {x.shape[1]} tokens")
    index = score.argsort(dim=1, stable=True)[:, :keep]
    context = _tokens.get()
    if context is not None:
        found, follow = context
        found[gate] = index
        index = follow.get(gate, index)
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2])), index


def fold_batch_norm(conv: nn.Conv2d, bn: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias of `conv` followed by `bn` in inference."""
    if bn is None:
        return conv.weight, conv.bias
    assert bn.running_mean is not None and bn.running_var is not None
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    bias = bn.bias - bn.running_mean * scale
    if conv.bias is not None:
        bias = bias + conv.bias * scale
    return conv.weight * scale.view(-1, 1, 1, 1), bias


def gated_conv(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d | None = None,
    *,
    gate: str,
    activation: str = "none",
    action: Tensor | None = None,
    tiles: Tensor | None = None,
    active_in: Tensor | None = None,
) -> Tensor:
    """Convolve under a gate (`dv.GatedConv`): `U = S * ([a=2] V + [a=1] H)`, `V = act(bn(conv(x)))`.

    H is V of the previous frame (zeros for the first), S the tile mask upsampled to V.

    Args:
        x: `[N, Cin, H, W]`.
        conv, bn: the layer; batch norm is folded when traced.
        gate: name of the gate whose decisions these are, such as `layer1.0`.
        activation: `none` or `relu`.
        action: integers `[N, Cout]` of `SKIP`, `REUSE`, `COMPUTE`; or, to train through the
            decision, floats `[N, Cout, 3]` that are one-hot over the actions. None computes all.
        tiles: `[N, gh, gw]`, nonzero where the output is active (floats to train). None: everywhere.
        active_in: `[N, Cin]`, promises that the other input channels are exactly zero.
    """
    if torch.compiler.is_exporting():
        return _traced_gated_conv(x, conv, bn, gate, activation, action, tiles, active_in)
    forced = _forced.get()
    if forced is not None:
        action = None if action is None else forced(gate, "action", action)
        tiles = None if tiles is None else forced(gate, "tiles", tiles)
    value = conv(x)
    if bn is not None:
        value = bn(value)
    if activation == "relu":
        value = F.relu(value)
    if action is not None:
        one_hot = action if action.is_floating_point() else F.one_hot(action, 3).to(value.dtype)
        keep, reuse = one_hot[..., COMPUTE, None, None], one_hot[..., REUSE, None, None]
        value = keep * value + reuse * delay(value, name=f"{gate}.history")
    if tiles is not None:
        value = value * upsample_tiles(tiles.to(value.dtype), (value.shape[2], value.shape[3]))
    return value


def _traced_gated_conv(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d | None,
    gate: str,
    activation: str,
    action: Tensor | None,
    tiles: Tensor | None,
    active_in: Tensor | None,
) -> Tensor:
    """Emit the `dv.GatedConv` node."""
    weight, bias = fold_batch_norm(conv, bn)
    size = [(x.shape[2 + i] + 2 * int(conv.padding[i]) - conv.kernel_size[i]) // conv.stride[i] + 1 for i in range(2)]
    inputs = (
        x,
        weight,
        bias,
        action,
        None if tiles is None else _as_bool(tiles),
        None if active_in is None else _as_bool(active_in),
    )
    attrs: dict[str, Any] = {
        "strides": list(conv.stride),
        "pads": [int(p) for p in conv.padding] * 2,
        "activation": activation,
        "gate": gate,
    }
    return torch.onnx.ops.symbolic(
        "dv::GatedConv",
        inputs,
        attrs=attrs,
        dtype=x.dtype,
        shape=(x.shape[0], conv.out_channels, *size),
        version=1,
    )


def _as_bool(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask != 0
