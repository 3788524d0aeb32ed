"""The decisions of a gate, as they are passed to `dvexport.gates`: checked, and in the form that is computed with.

A decision that is an integer or a truth value means the same in eager mode and in an artifact. Floats are there to
train through, and are refused when the model is exported.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dvexport.gate_layers import refused

__all__ = ["checked_action", "checked_active_in", "checked_keep", "checked_tiles"]


def checked_action(action: Tensor | None, frames: int, channels: int, gate: str, *, traced: bool) -> Tensor | None:
    """Return an action: int64 `[N, Cout]`, or floats `[N, Cout, 3]` to train through.

    Raises:
        UsageError: another shape or type, a value that is no action, or floats when traced.
    """
    if action is None:
        return None
    floating = action.is_floating_point()
    if floating and traced:
        raise _only_to_train("action", gate, "scores.argmax(-1)")
    expected = (frames, channels, 3) if floating else (frames, channels)
    _check_shape("action", action, expected, gate, "floats [frames, Cout, 3]" if floating else "[frames, Cout]")
    if floating:
        return action
    if action.dtype == torch.bool or action.is_complex():
        raise refused(gate, f"action is {action.dtype}", "skip, reuse and compute are 0, 1 and 2",
                      "pass integers: gates.SKIP, gates.REUSE, gates.COMPUTE")  # fmt: skip
    if _is_known(action):
        wrong = action[(action < 0) | (action > 2)]
        if wrong.numel():
            raise refused(gate, f"action holds {int(wrong[0])}", "skip, reuse and compute are 0, 1 and 2")
    return action.to(torch.int64)


def checked_tiles(tiles: Tensor | None, frames: int, gate: str, *, traced: bool) -> Tensor | None:
    """Return a tile mask: bool `[N, gh, gw]`, or floats to train through; UsageError as for an action."""
    if tiles is None:
        return None
    if tiles.is_floating_point() and traced:
        raise _only_to_train("tiles", gate, "scores >= 0")
    if tiles.dim() != 3 or tiles.shape[0] != frames or 0 in tiles.shape[1:]:
        hint = "squeeze the channel axis of a mask: mask.squeeze(1)" if tiles.dim() == 4 else None
        raise refused(gate, f"tiles are {_sizes(tiles)}, they must be [frames, rows, columns] of {frames} frames",
                      hint=hint)  # fmt: skip
    return tiles if tiles.is_floating_point() or tiles.dtype == torch.bool else tiles != 0


def checked_active_in(active_in: Tensor | None, x: Tensor, gate: str, *, kept: bool = True) -> Tensor | None:
    """Return a promise as bool `[N, Cin]`; UsageError for another shape, and if it is to be `kept` and x breaks it."""
    if active_in is None:
        return None
    _check_shape("active_in", active_in, tuple(x.shape[:2]), gate, "[frames, Cin]")
    active = active_in if active_in.dtype == torch.bool else active_in != 0
    if kept and _is_known(x) and _is_known(active):
        broken = ((x.detach().abs().amax((2, 3)) > 0) & ~active).nonzero()
        if len(broken):
            frame, channel = broken[0].tolist()
            raise refused(gate, f"active_in promises that channel {channel} of frame {frame} is zero, and it is not",
                          "an artifact leaves out such channels, and would give other numbers",
                          "promise only what holds: that the gate before skipped the channel")  # fmt: skip
    return active


def checked_keep(x: Tensor, score: Tensor, keep: int, gate: str, *, traced: bool) -> None:
    """Raise UsageError unless `keep` of the tokens x `[B, N, C]` can be chosen by score `[B, N]`."""
    if not isinstance(keep, int) or isinstance(keep, bool):
        raise refused(gate, f"keep is a {type(keep).__name__}", "how many tokens go on is fixed, so that shapes are",
                      "pass a Python int")  # fmt: skip
    if x.dim() != 3 or tuple(score.shape) != tuple(x.shape[:2]):
        raise refused(gate, f"tokens are {_sizes(x)} and scores {_sizes(score)}, they must be [B, N, C] and [B, N]")
    if not 1 <= keep <= x.shape[1]:
        raise refused(gate, f"gate {gate} keeps {keep} of {x.shape[1]} tokens")
    if not (x.is_floating_point() and score.is_floating_point()):
        raise refused(gate, f"tokens are {x.dtype} and scores {score.dtype}", "both must be floating point numbers")
    if traced and not x.dtype == score.dtype == torch.float32:
        raise refused(gate, f"tokens are {x.dtype} and scores {score.dtype} when the model is exported",
                      "artifacts compute in float32", "export the float32 model")  # fmt: skip
    if _is_known(score) and not score.isfinite().all():
        raise refused(gate, "a score is NaN or infinite", "runtimes would order it differently",
                      "make scores finite: torch.nan_to_num")  # fmt: skip


def _is_known(value: Tensor) -> bool:
    """Tell whether a tensor holds numbers that Python may look at: not in a trace, on meta, or of a fake."""
    return type(value) in (Tensor, nn.Parameter) and not value.is_meta and not torch.compiler.is_compiling()


def _only_to_train(name: str, gate: str, instead: str) -> Exception:
    return refused(gate, f"{name} of floats when the model is exported",
                   "floats are to train through; an artifact has hard decisions",
                   f"in evaluation pass {instead}")  # fmt: skip


def _check_shape(name: str, value: Tensor, expected: tuple[int, ...], gate: str, axes: str) -> None:
    if value.dim() != len(expected) or tuple(value.shape) != expected:
        raise refused(gate, f"{name} is {_sizes(value)}, it must be {axes}, here {list(expected)}")


def _sizes(value: Tensor) -> str:
    return str(list(value.shape))
