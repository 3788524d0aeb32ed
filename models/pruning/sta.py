"""STA: drops tokens inside a trained video transformer, without new parameters and without retraining.

After some blocks the tokens are divided into groups of adjacent frames, and each group drops r of them.
Walking through the groups in one direction of time, a group's first member drops the tokens most like
another of its own; each later group keeps what the one before predicts least (temporal redundancy) and
what is strong itself (semantics). With m the keys of the block's attention, averaged over the heads and
L2-normalised, and x the block's output:

    first group     even tokens by their largest cosine to an odd one, r largest dropped; odd ones stay
    later groups    P = softmax over the group's tokens of m_t . m_before,  A_t = P A_before,
                    score = A_t (1 - F), F = sum |x| min-max normalised in the group; N - r smallest stay

A_before is 1 for every token of the first group, dropped ones too; from then on it is that of the
survivors, divided by its sum. Survivors stand in the order of their scores. Semantics are those of the
official code (Mark12Ding/STA faf10be), in float32, but that a group of equal strength has F = 0 where
the code divides 0 by 0.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from dvexport import gates
from dvexport.errors import UsageError, unknown_name
from dvexport.models.config import StaSettings
from dvexport.models.pruning.pruning_stage import PruningStage
from dvexport.models.pruning.random_drop import drop_at_random, random_scores

__all__ = [
    "drop_tokens",
    "is_off",
    "mean_key",
    "plan_stages",
    "prune",
    "rows",
    "select_survivors",
    "weakness",
    "without_pruning",
]

_off: ContextVar[bool] = ContextVar("sta_off", default=False)


def plan_stages(settings: StaSettings, grid: tuple[int, int, int], depth: int) -> list[PruningStage]:
    """Return where how many tokens are dropped.

    Args:
        settings: the options.
        grid: tokens in time, height and width.
        depth: blocks of the transformer.

    Raises:
        UsageError: options that don't fit one another, the clip or the depth.
    """
    blocks = settings.stages or (0, depth // 3, 2 * depth // 3)
    _check_settings(settings, blocks, depth)
    stages: list[PruningStage] = []
    tokens, whole = math.prod(grid), grid[0]
    for call, (block, groups, direction) in enumerate(zip(blocks, settings.groups, settings.direction, strict=True)):
        if groups < 1 or whole % groups:
            what = f"a clip of {whole} frames of tokens" if call == 0 else f"{whole} groups"
            raise UsageError(
                f"{what} can't be joined to {groups} groups",
                where=f"sta.groups={','.join(map(str, settings.groups))}",
                hint=f"each number divides the one before, and the first divides {grid[0]}",
            )
        size = tokens // groups
        if settings.r > size // 2:
            raise UsageError(
                f"sta.r={settings.r} is too large: a group of pruning {call} has {size} tokens",
                where=f"after block {block}, {groups} groups",
                why="at most half of a group can be dropped, as only every second token of the first one may go",
                hint=f"sta.r={size // 2} or less, or fewer groups",
            )
        stages.append(PruningStage(call, block, groups, size, size - settings.r, direction))
        tokens, whole = groups * (size - settings.r), groups
    return stages


def _check_settings(settings: StaSettings, blocks: Sequence[int], depth: int) -> None:
    if settings.r < 0:
        raise UsageError(f"sta.r={settings.r} is negative", hint="sta.r=0 prunes nothing")
    if not len(blocks) == len(settings.groups) == len(settings.direction):
        raise UsageError(
            f"{len(blocks)} stages, {len(settings.groups)} groups and {len(settings.direction)} directions for STA",
            hint="give sta.stages, sta.groups and sta.direction equally many values",
        )
    if list(blocks) != sorted(set(blocks)) or not all(0 <= block < depth for block in blocks):
        raise UsageError(
            f"STA can't prune after blocks {', '.join(map(str, blocks))}",
            where="sta.stages",
            why=f"the transformer has blocks 0 to {depth - 1}",
            hint="name each block once, in ascending order",
        )
    for direction in settings.direction:
        if direction not in ("forward", "reverse"):
            raise unknown_name("direction of STA", direction, ("forward", "reverse"))


def drop_tokens(x: Tensor, metric: Tensor, stage: PruningStage) -> Tensor:
    """Return the tokens that stay, see `select_survivors`."""
    return select_survivors(x, metric, stage)[0]


def select_survivors(x: Tensor, metric: Tensor, stage: PruningStage) -> tuple[Tensor, list[Tensor]]:
    """Drop tokens as STA does.

    Args:
        x: `[B, groups * tokens, C]`, the output of a block.
        metric: `[B, groups * tokens, D]`, the keys of its attention, averaged over heads, not normalised.
        stage: how many, and in which direction of time.

    Returns:
        The tokens that stay, `[B, groups * keep, C]`: groups in the order of time, each in that of its scores.
        For each group their places in it, int64 `[B, keep]`.
    """
    metric = metric / metric.norm(dim=2, keepdim=True).clamp_min(1e-12)
    weak = weakness(x, stage)
    if x.shape[0] == 1:  # without the batch axis, choosing traces to far fewer operators
        metric, weak = metric.squeeze(0), weak.squeeze(0)
    tokens, keys, weak_of = x.split(stage.tokens, dim=1), metric.split(stage.tokens, dim=-2), weak.split(1, dim=-2)
    kept: dict[int, Tensor] = {}
    places: dict[int, Tensor] = {}
    before = attention = None
    for group in _order(stage):
        now, gate = keys[group], stage.gate(group)
        if before is None:
            score = _likeness(now).reshape(x.shape[0], stage.tokens)
            kept[group], places[group] = gates.select_tokens(tokens[group], score, stage.keep, gate=gate)
            before = now
            continue
        shares = (before @ now.transpose(-1, -2)).softmax(dim=-1)  # [.., before, now]: each token gives away 1
        attention = shares.sum(-2, keepdim=True) if attention is None else attention @ shares
        score = attention * weak_of[group]  # [.., 1, now]
        score = score if score.ndim == 2 else score.squeeze(1)
        kept[group], index = gates.select_tokens(tokens[group], score, stage.keep, gate=gate)
        places[group] = index
        before, attention = _taken(now, index, 0), _taken(attention, index, 1)
        attention = attention / attention.sum(-1, keepdim=True)
    in_time = range(stage.groups)
    return torch.cat([kept[group] for group in in_time], dim=1), [places[group] for group in in_time]


def _taken(values: Tensor, index: Tensor, axis: int) -> Tensor:
    """Return the rows (`axis` 0) or columns (1) `index` `[B, K]` of `values` `[B, M, N]`, `[M, N]` for one clip."""
    if values.ndim == 2:
        return values.index_select(axis, index.squeeze(0))
    if axis == 0:
        return rows(values, index)
    return values.gather(2, index.unsqueeze(1).expand(-1, values.shape[1], -1))


def _order(stage: PruningStage) -> Sequence[int]:
    groups = range(stage.groups)
    return groups if stage.direction == "forward" else groups[::-1]


def _likeness(keys: Tensor) -> Tensor:
    """Return `[.., N]` of `[.., N, D]`: for even tokens the largest cosine to an odd one, for odd ones less."""
    cosine = keys[..., ::2, :] @ keys[..., 1::2, :].transpose(-1, -2)
    even = cosine.amax(-1)
    odd = torch.full_like(even, -2.0)
    return torch.stack([even, odd], dim=-1).flatten(-2)[..., : keys.shape[-2]]


def weakness(x: Tensor, stage: PruningStage) -> Tensor:
    """Return 1 - F `[B, groups, tokens]`: 0 for the strongest token of a group, 1 for the weakest."""
    strength = x.abs().sum(2).reshape(x.shape[0], stage.groups, stage.tokens)
    low, high = strength.amin(2, keepdim=True), strength.amax(2, keepdim=True)
    return 1 - (strength - low) / (high - low).clamp_min(1e-12)


def rows(values: Tensor, index: Tensor) -> Tensor:
    """Return the rows `index` `[B, K]` of `values` `[B, N, D]`; for one clip this traces to a plain Gather."""
    if values.shape[0] == 1:
        return values.squeeze(0).index_select(0, index.squeeze(0)).unsqueeze(0)
    return values.gather(1, index.unsqueeze(2).expand(-1, -1, values.shape[2]))


class _Pruner:
    """Hooks of one block: they see what its attention reads, and drop tokens of what it returns."""

    def __init__(self, stage: PruningStage, where: str, attention: str, keys: str, heads: int) -> None:
        self.stage, self.where, self.attention, self.keys, self.heads = stage, where, attention, keys, heads
        self.seen: Tensor | None = None

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the attention reads (a forward pre-hook)."""
        if not _off.get():
            self.seen = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    def drop(self, block: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """Return the block's output with fewer tokens (a forward hook)."""
        if _off.get():
            return output
        x = output[0] if isinstance(output, tuple) else output
        seen, self.seen = self.seen, None
        self._check(x, seen)
        x = self.shortened(block, x, seen)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def shortened(self, block: nn.Module, x: Tensor, seen: Tensor | None) -> Tensor:
        """Drop tokens by STA's scores."""
        assert seen is not None
        weight, bias = mean_key(block.get_submodule(self.attention), self.keys, self.heads, self.where)
        return drop_tokens(x, nn.functional.linear(seen, weight, bias), self.stage)

    def _check(self, x: Any, seen: Tensor | None) -> None:
        wanted = self.stage.groups * self.stage.tokens
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[1] != wanted:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise UsageError(
                f"STA can't prune after {self.where}: it returns {found}",
                why=f"looked for tokens [clips, {wanted}, channels]",
                hint="give the grid of the tokens, time first; class tokens and windows are not supported",
            )
        if seen is None or seen.shape[:2] != x.shape[:2]:
            found = "nothing" if seen is None else f"{tuple(seen.shape)}"
            raise UsageError(
                f"STA found no keys in {self.where}",
                why=f"looked for the tokens that '{self.attention}' reads and found {found}",
                hint="name the attention of a block: prune(..., attention=...)",
            )


class _RandomPruner(_Pruner):
    """Drops as many tokens as STA, but at random: the same ones of every clip."""

    def __init__(self, stage: PruningStage, where: str, attention: str, keys: str, heads: int, seed: int) -> None:
        super().__init__(stage, where, attention, keys, heads)
        self.scores = random_scores(stage, seed)

    def shortened(self, block: nn.Module, x: Tensor, seen: Tensor | None) -> Tensor:
        """Drop tokens by scores drawn once."""
        return drop_at_random(x, self.stage, self.scores)[0]


def prune(
    model: nn.Module,
    *,
    grid: tuple[int, int, int],
    settings: StaSettings | None = None,
    blocks: str = "blocks",
    attention: str = "attn",
    keys: str = "qkv",
    heads: int | None = None,
) -> list[PruningStage]:
    """Make a trained transformer drop tokens, in place. Parameters and their names stay as they are.

    Args:
        model: the video model, or whatever holds the blocks. It gets `token_groups` and `token_grid`, which
            tell how decisions map to tokens, and `without_pruning()`, see the function of that name.
        grid: tokens in time, height and width; blocks take and return `[B, time * height * width, C]`.
        settings: r, groups, stages, direction; r = 0 leaves the model alone.
        blocks: path of the list of blocks.
        attention: path of the attention in a block; its first argument is what keys are made of.
        keys: path, in the attention, of the linear layer that gives the keys; one with three times as many
            outputs as the tokens have channels holds queries, keys and values in this order.
        heads: attention heads; None asks the attention (`num_heads`, `num_attention_heads` or `heads`).

    Returns:
        Where how many tokens are dropped.

    Raises:
        UsageError: the transformer is not as described, or the options don't fit it.
    """
    settings = settings or StaSettings()
    if settings.r == 0:
        return []
    found = _blocks(model, blocks)
    stages = plan_stages(settings, grid, len(found))
    for stage in stages:
        block, where = found[stage.block], f"{blocks}.{stage.block}"
        attending = _child(block, attention, where, "attention")
        count = heads or _heads(attending, f"{where}.{attention}")
        mean_key(attending, keys, count, f"{where}.{attention}")
        pruner = (
            _Pruner(stage, where, attention, keys, count)
            if settings.method == "sta"
            else _RandomPruner(stage, where, attention, keys, count, settings.seed)
        )
        attending.register_forward_pre_hook(pruner.see, with_kwargs=True)
        block.register_forward_hook(pruner.drop)
    model.token_grid, model.token_groups = grid, stages  # type: ignore[assignment]
    model.without_pruning = functools.partial(without_pruning, model)  # type: ignore[assignment]
    return stages


def _blocks(model: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
    found = _child(model, path, type(model).__name__, "list of blocks")
    if not isinstance(found, (nn.ModuleList, nn.Sequential)) or not len(found):
        raise _not_recognised(f"'{path}', a list of blocks", f"a {type(found).__name__}", type(model).__name__)
    return found


def _child(module: nn.Module, path: str, where: str, what: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        children = ", ".join(name for name, _ in module.named_children()) or "no layers"
        raise _not_recognised(f"'{path}', the {what}", children, where) from None


def _heads(attention: nn.Module, where: str) -> int:
    for name in ("num_heads", "num_attention_heads", "heads"):
        if isinstance(count := getattr(attention, name, None), int):
            return count
    raise _not_recognised("the number of heads, as num_heads, num_attention_heads or heads", "none of them", where)


def mean_key(attention: nn.Module, path: str, heads: int, where: str) -> tuple[Tensor, Tensor | None]:
    """Return weight `[D, C]` and bias of the keys' mean over the heads: the mean of their weights."""
    layer = _child(attention, path, where, "linear layer of the keys")
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise _not_recognised(f"'{path}', a linear layer", f"a {type(layer).__name__}", where)
    rows, channels = weight.shape
    if rows == 3 * channels:
        weight = weight[channels : 2 * channels]
        bias = None if bias is None else bias[channels : 2 * channels]
    if weight.shape[0] % heads:
        raise _not_recognised(f"keys of {heads} heads", f"{weight.shape[0]} rows in '{path}'", where)
    mean_bias = None if bias is None else bias.reshape(heads, -1).mean(0)
    return weight.reshape(heads, -1, channels).mean(0), mean_bias


def _not_recognised(wanted: str, found: str, where: str) -> UsageError:
    return UsageError(
        "STA does not recognise this transformer",
        where=where,
        why=f"looked for {wanted}; found {found}",
        hint="name its parts: dvexport.models.sta.prune(model, blocks=..., attention=..., keys=..., heads=...)",
    )


def without_pruning(model: Any) -> Any:
    """Return the same model, with the same layers and weights, as it is without token pruning.

    Nothing is copied: both share every parameter, under the same names.
    """
    twin = copy.copy(model)
    twin.forward = functools.partial(_unpruned, model)
    twin.token_groups = []
    twin.without_pruning = functools.partial(_itself, twin)
    return twin


def _itself(model: Any) -> Any:
    return model


def _unpruned(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with _pruning_off():
        return model.forward(*args, **kwargs)


def is_off() -> bool:
    """Tell whether the model runs as `without_pruning`."""
    return _off.get()


@contextmanager
def _pruning_off() -> Iterator[None]:
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)
