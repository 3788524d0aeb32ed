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

from dvexport.decisions import ACTION, TILES, Action
from dvexport.errors import UsageError
from dvexport.gate_decisions import checked_action, checked_active_in, checked_keep, checked_tiles
from dvexport.gate_layers import check_activation, check_conv, check_input, check_norm, conv_attributes
from dvexport.geometry import output_size
from dvexport.names import name_problem

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

SKIP, REUSE, COMPUTE = (int(action) for action in Action)
"""The actions of an output channel (AdaFuse, section 3; D-STEP, section 3.1)."""

_tokens: ContextVar[tuple[dict[str, Tensor], Mapping[str, Tensor]] | None] = ContextVar("tokens", default=None)

_forced: ContextVar[Callable[[str, str, Tensor], Tensor] | None] = ContextVar("forced", default=None)

_clip_length: ContextVar[int | None] = ContextVar("clip_length", default=None)


@contextmanager
def frames_per_clip(frames: int) -> Iterator[None]:
    """Within this context axis 0 holds clips of `frames` frames each, one after another.

    Raises:
        UsageError: fewer than one frame; in use, an axis 0 that is no multiple of `frames`, or an export.
    """
    if frames < 1:
        raise UsageError(f"a clip has at least one frame, not {frames}")
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

    What else a model makes of its own decisions stays its own: `dvexport.run.forced_eager` lets that follow too.

    Args:
        decisions: by gate and kind, `action` int64 `[N, C]` or `tiles` bool `[N, gh, gw]`. What is not named, or has
            another shape than the model's own, is left as it is.
        told: called with the gate, the kind and the model's own decision at each call that takes one.
    """

    def taken(gate: str, kind: str, own: Tensor) -> Tensor:
        if told is not None:
            told(gate, kind, own)
        given = decisions.get((gate, kind))
        one_hot = kind == ACTION.name and own.is_floating_point()
        return own if given is None or given.shape != (own.shape[:-1] if one_hot else own.shape) else given

    token = _forced.set(taken)
    try:
        yield
    finally:
        _forced.reset(token)


def _by_clip(x: Tensor) -> Tensor:
    """View `[B*T, ...]` as `[B, T, ...]`."""
    frames = _clip_length.get() or x.shape[0]
    if frames == 0 or x.shape[0] % frames:
        raise UsageError(f"axis 0 holds {x.shape[0]} frames, which are no clips of {frames}",
                         hint="stack whole clips along axis 0")  # fmt: skip
    return x.reshape(-1, frames, *x.shape[1:])


def delay(x: Tensor, *, name: str) -> Tensor:
    """Return the previous frame's `x`, zeros for the first frame (`dv.Delay`).

    Args:
        x: `[N, ...]`.
        name: names the state that a stream keeps.

    Raises:
        UsageError: an illegal name, an x without a frame axis, or of a type that states don't have when exported.
    """
    _check_name(name)
    if x.dim() < 1:
        raise UsageError("delay needs a frame axis, x has no axes", where=f"state {name}")
    if torch.compiler.is_exporting():
        _check_traced_state(x, name, (torch.float32, torch.int64, torch.bool))
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

    Raises:
        UsageError: an illegal name, an x of another rank, or that is not of floats (float32 when exported).
    """
    _check_name(name)
    if x.dim() != 2 or not x.is_floating_point():
        raise UsageError(f"frame_mean takes floats [frames, K], not {x.dtype} {list(x.shape)}", where=f"state {name}")
    if torch.compiler.is_exporting():
        _check_traced_state(x, name, (torch.float32,))
        return torch.onnx.ops.symbolic(
            "dv::FrameMean", (x,), attrs={"name": name}, dtype=x.dtype, shape=x.shape, version=1
        )
    clips = _by_clip(x)
    count = torch.arange(1, clips.shape[1] + 1, dtype=x.dtype, device=x.device)
    return (clips.cumsum(dim=1) / count.view(1, -1, 1)).reshape(x.shape)


def upsample_tiles(tiles: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample a tile mask `[N, gh, gw]` to `[N, 1, *size]`: pixel y reads cell floor(y*gh/height).

    Raises:
        UsageError: tiles of another rank, or a plane without pixels.
    """
    if tiles.dim() != 3 or min(size) < 1:
        raise UsageError(f"tiles {list(tiles.shape)} can't be upsampled to {list(size)}",
                         why="they must be [frames, rows, columns], and the plane of one pixel at least")  # fmt: skip
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

    Raises:
        UsageError: shapes or types that do not fit, a `keep` out of range, a score that is not finite.
    """
    _check_name(gate)
    checked_keep(x, score, keep, gate, traced=torch.compiler.is_exporting())
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
    index = score.argsort(dim=1, stable=True)[:, :keep]
    context = _tokens.get()
    if context is not None:
        found, follow = context
        found[gate] = index
        index = follow.get(gate, index)
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2])), index


def fold_batch_norm(conv: nn.Conv2d, bn: nn.BatchNorm2d | nn.SyncBatchNorm | None) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias of `conv` followed by `bn` in inference, as `nn.Conv2d` holds them.

    Raises:
        UsageError: layers that are no convolution and batch norm, or compute something of their own.
    """
    check_conv(conv, "")
    check_norm(bn, conv.weight.shape[0], "")
    if bn is None:
        return conv.weight, conv.bias
    assert bn.running_mean is not None and bn.running_var is not None
    scale = (1 if bn.weight is None else bn.weight) / torch.sqrt(bn.running_var + bn.eps)
    bias = (0 if bn.bias is None else bn.bias) - bn.running_mean * scale
    if conv.bias is not None:
        bias = bias + conv.bias * scale
    return conv.weight * scale.view(-1, 1, 1, 1), bias


def gated_conv(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d | nn.SyncBatchNorm | None = None,
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
        conv, bn: the layer; batch norm is folded when traced. Any kernel, stride, dilation and zero padding;
            ungrouped. Parametrised weights are taken as they are in evaluation.
        gate: name of the gate whose decisions these are, such as `layer1.0`.
        activation: `none` or `relu`.
        action: integers `[N, Cout]` of `SKIP`, `REUSE`, `COMPUTE`; or, to train through the
            decision, floats `[N, Cout, 3]` that are one-hot over the actions. None computes all.
        tiles: `[N, gh, gw]`, nonzero where the output is active (floats to train). None: everywhere.
        active_in: `[N, Cin]`, promises that the other input channels are exactly zero.

    Raises:
        UsageError: something that the dialect has no place for, in eager mode as in a trace: it is named. A promise
            and the values of an action are checked in eager mode. A trace also refuses hooks, layers in training
            mode, floats other than float32, and decisions made of floats.
    """
    traced = torch.compiler.is_exporting()
    _check_name(gate)
    check_activation(activation, gate)
    check_conv(conv, gate, traced=traced)
    check_norm(bn, conv.weight.shape[0], gate, traced=traced)
    check_input(x, conv, gate, traced=traced)
    action = checked_action(action, x.shape[0], conv.weight.shape[0], gate, traced=traced)
    tiles = checked_tiles(tiles, x.shape[0], gate, traced=traced)
    # Under forced decisions a model's own promise may be about its own decision, which x did not follow.
    active_in = checked_active_in(active_in, x, gate, kept=_forced.get() is None)
    if traced:
        return _traced_gated_conv(x, conv, bn, gate, activation, action, tiles, active_in)
    forced = _forced.get()
    if forced is not None:
        action = None if action is None else forced(gate, ACTION.name, action)
        tiles = None if tiles is None else forced(gate, TILES.name, tiles)
    value = conv(x)
    if bn is not None:
        value = bn(value)
    if activation == "relu":
        value = F.relu(value)
    if action is not None:
        keep, reuse = (_share(action, which, value.dtype)[..., None, None] for which in (COMPUTE, REUSE))
        value = keep * value + reuse * delay(value, name=f"{gate}.history")
    if tiles is not None:
        value = value * upsample_tiles(tiles.to(value.dtype), (value.shape[2], value.shape[3]))
    return value


def _share(action: Tensor, which: int, dtype: torch.dtype) -> Tensor:
    """Return `[N, Cout]`: 1 where the action is `which`; of floats, those of that action."""
    return action[..., which] if action.is_floating_point() else (action == which).to(dtype)


def _traced_gated_conv(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d | nn.SyncBatchNorm | None,
    gate: str,
    activation: str,
    action: Tensor | None,
    tiles: Tensor | None,
    active_in: Tensor | None,
) -> Tensor:
    """Emit the `dv.GatedConv` node."""
    if action is not None:
        _refuse_clips(f"gate {gate}")
    weight, bias = fold_batch_norm(conv, bn)
    geometry = conv_attributes(conv, gate)
    size = output_size(x.shape[2:], weight.shape[2:], geometry)
    attrs: dict[str, Any] = {**geometry, "activation": activation, "gate": gate}
    return torch.onnx.ops.symbolic(
        "dv::GatedConv",
        (x, weight, bias, action, tiles, active_in),
        attrs=attrs,
        dtype=x.dtype,
        shape=(x.shape[0], weight.shape[0], *size),
        version=1,
    )


def _check_name(name: str) -> None:
    problem = name_problem(name)
    if problem:
        raise UsageError(f"a gate or a state can't be called so: {problem}")


def _refuse_clips(where: str) -> None:
    """A traced model runs one clip: the borders of several would be lost."""
    if _clip_length.get() is not None:
        raise UsageError(
            "frames_per_clip is on when the model is exported",
            where=where,
            why="an artifact runs one clip",
            hint="leave the context to the training, outside of forward",
        )


def _check_traced_state(x: Tensor, name: str, types: tuple[torch.dtype, ...]) -> None:
    """Refuse what a stream can't keep."""
    _refuse_clips(f"state {name}")
    if x.dtype not in types:
        raise UsageError(f"a state is {x.dtype} when the model is exported", where=f"state {name}",
                         hint=f"one of: {', '.join(str(kind) for kind in types)}")  # fmt: skip
