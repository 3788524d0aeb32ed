"""The layers of a gate: what of a convolution and a batch norm the dialect carries, and what is refused by name.

A trace replaces a layer by its numbers, so nothing of the layer may be lost on the way: each attribute goes into
`dv.GatedConv`, or is an error where the gate is called, before anybody trains with it. `traced` says that the call
is being exported: some things, such as observing hooks or half precision, do no harm before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter

from dvexport.errors import UsageError, unknown_name
from dvexport.geometry import output_size
from dvexport.names import ACTIVATIONS

__all__ = ["check_activation", "check_conv", "check_input", "check_norm", "conv_attributes", "refused"]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_EVERYWHERE = (module._global_forward_pre_hooks, module._global_forward_hooks)
"""Hooks on every module there is (`torch.nn.modules.module.register_module_forward_hook`)."""
_ON_HOOKS = (
    "take it off before the export (`torch.nn.utils.remove_weight_norm`, `remove_spectral_norm`, `prune.remove`; "
    "their successors in `torch.nn.utils.parametrizations` need none), or hook the module around it"
)


def refused(gate: str, what: str, why: str | None = None, hint: str | None = None) -> UsageError:
    """Return the error for a gate that is called with something its operator has no place for."""
    return UsageError(what, where=f"gate {gate}" if gate else None, why=why, hint=hint)


def check_activation(activation: str, gate: str) -> None:
    """Raise UsageError unless an activation is one of the dialect's."""
    if activation not in ACTIVATIONS:
        error = unknown_name("activation", str(activation), ACTIVATIONS)
        raise refused(gate, error.what, "the dialect would compute none in its place",
                      f"one of: {', '.join(ACTIVATIONS)}")  # fmt: skip


def check_conv(conv: nn.Conv2d, gate: str, *, traced: bool = False) -> None:
    """Raise UsageError unless a layer computes what `nn.Conv2d` does with its weight and bias."""
    if not isinstance(conv, nn.Conv2d):
        hint = "pass a torch.nn.Conv2d"
        if isinstance(conv, _BatchNorm):
            hint = "the convolution comes first: gated_conv(x, conv, bn, ...)"
        raise refused(gate, f"conv is a {type(conv).__name__}", "gates are defined on 2-D convolutions", hint)
    if isinstance(conv.weight, UninitializedParameter):
        raise refused(gate, f"conv is a {type(conv).__name__} that has no weight yet", None,
                      "call it once on an input of the right size, before the gate does")  # fmt: skip
    _check_layer(conv, nn.Conv2d, ("forward", "_conv_forward"), "conv", gate, traced)
    if conv.weight.dim() != 4:
        raise refused(gate, f"conv has a weight of {conv.weight.dim()} axes", "gates are defined on 2-D convolutions")


def check_norm(bn: nn.Module | None, channels: int, gate: str, *, traced: bool = False) -> None:
    """Raise UsageError unless a layer is a batch norm with statistics of its own, over `channels`."""
    if bn is None:
        return
    if not isinstance(bn, _NORMS):
        raise refused(gate, f"bn is a {type(bn).__name__}", "only batch norm folds into a convolution",
                      "pass a torch.nn.BatchNorm2d, or leave bn out")  # fmt: skip
    base = nn.SyncBatchNorm if isinstance(bn, nn.SyncBatchNorm) else _BatchNorm
    _check_layer(bn, base, ("forward",), "bn", gate, traced)
    mean, var = bn.running_mean, bn.running_var
    if mean is None or var is None:
        raise refused(gate, "bn has no running statistics (track_running_stats=False)",
                      "it would normalise by those of the frames at hand, which folds into no weight",
                      "create it with track_running_stats=True")  # fmt: skip
    for name, value in (("running_mean", mean), ("running_var", var), ("weight", bn.weight), ("bias", bn.bias)):
        if value is not None and tuple(value.shape) != (channels,):
            raise refused(gate, f"bn has a {name} of {list(value.shape)}, the convolution {channels} output channels")


def check_input(x: Tensor, conv: nn.Conv2d, gate: str, *, traced: bool = False) -> None:
    """Raise UsageError unless a convolution can be applied to x, `[N, Cin, H, W]`."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        found = f"has {x.dim()} axes" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
        raise refused(gate, f"x {found}, it must be [frames, channels, height, width]")
    geometry = conv_attributes(conv, gate)
    if x.shape[1] != conv.weight.shape[1]:
        raise refused(gate, f"x has {x.shape[1]} channels, the convolution reads {conv.weight.shape[1]}")
    if not x.is_floating_point():
        raise refused(gate, f"x is {x.dtype}", "gates work on floating point numbers")
    if min(output_size(x.shape[2:], conv.weight.shape[2:], geometry)) < 1:
        raise refused(gate, f"the window of {list(conv.weight.shape[2:])} pixels does not fit x, "
                            f"of {list(x.shape[2:])}")  # fmt: skip
    if traced and torch.is_autocast_enabled(x.device.type):
        raise refused(gate, "autocast is on when the model is exported", "artifacts compute in float32",
                      "leave torch.autocast to the training, outside of forward")  # fmt: skip
    if traced and x.dtype != torch.float32:
        raise refused(gate, f"x is {x.dtype} when the model is exported", "artifacts compute in float32",
                      "export the float32 model")  # fmt: skip


def conv_attributes(conv: nn.Conv2d, gate: str) -> dict[str, Any]:
    """Return the geometry of a convolution as `dv.GatedConv` has it: strides, pads, dilations.

    Raises:
        UsageError: an attribute that gates are not defined for, named.
    """
    if conv.groups != 1:
        kind = "depthwise" if conv.groups == conv.weight.shape[0] else "grouped"
        raise refused(gate, f"conv is {kind} (groups={conv.groups})", "gates are defined on ungrouped convolutions",
                      "leave it outside of the gate")  # fmt: skip
    if conv.padding_mode != "zeros":
        raise refused(gate, f"conv has padding_mode='{conv.padding_mode}'", "the dialect pads with zeros",
                      "use padding_mode='zeros', or leave the convolution outside of the gate")  # fmt: skip
    strides, dilations = _pair(conv.stride), _pair(conv.dilation)
    kernel = [int(size) for size in conv.weight.shape[2:]]
    pads = _pads(conv.padding, kernel, strides, dilations, gate)
    for name, values, least in (("stride", strides, 1), ("dilation", dilations, 1), ("padding", pads[:2], 0)):
        if len(values) != 2 or min(values) < least:
            raise refused(gate, f"conv has {name}={values}", f"it must be two numbers of at least {least}")
    return {"strides": strides, "pads": pads, "dilations": dilations}


def _pads(
    padding: str | int | tuple[int, ...], kernel: list[int], strides: list[int], dilations: list[int], gate: str
) -> list[int]:
    """Return ONNX's pads: top, left, bottom, right."""
    if padding == "valid":
        return [0, 0, 0, 0]
    if padding == "same":  # where the total is odd, the larger half lies below and to the right, as in torch
        if strides != [1, 1]:
            raise refused(gate, f"conv has padding='same' and a stride of {strides}", "torch defines no such padding")
        total = [dilation * (size - 1) for dilation, size in zip(dilations, kernel, strict=True)]
        first = [size // 2 for size in total]
        return first + [size - half for size, half in zip(total, first, strict=True)]
    if isinstance(padding, str):
        raise refused(gate, f"conv has padding='{padding}'", hint="'same', 'valid' or numbers")
    return _pair(padding) * 2


def _pair(value: int | tuple[int, ...]) -> list[int]:
    """Return what a layer holds for both axes, which torch also takes as one number."""
    values = [int(item) for item in value] if isinstance(value, (tuple, list)) else [int(value)]
    return values * 2 if len(values) == 1 else values


def _check_layer(
    layer: Any, base: type[nn.Module], methods: tuple[str, ...], role: str, gate: str, traced: bool
) -> None:
    """Refuse a layer that computes something else than its base class does with its tensors."""
    for name in (*methods, "__call__", "_call_impl", "_wrapped_call_impl"):
        if getattr(type(layer), name) is not getattr(base, name) or name in vars(layer):
            raise refused(gate, f"{role} is a {type(layer).__name__} with a {name} of its own",
                          f"a trace takes only the tensors of a {base.__name__.lstrip('_')}",
                          "compute in the layer around it, or by torch.nn.utils.parametrize on its weight")  # fmt: skip
    tensors = {name: getattr(layer, name, None) for name in ("weight", "bias", "running_mean", "running_var")}
    found = {name: value.dtype for name, value in tensors.items() if value is not None}
    for name, dtype in found.items():
        if dtype not in _FLOATS:
            raise refused(gate, f"{role} has a {name} of {dtype}", "gates work on floating point numbers")
        if traced and dtype != torch.float32:
            raise refused(gate, f"{role} has a {name} of {dtype} when the model is exported",
                          "artifacts compute in float32", "export the float32 model: model.float()")  # fmt: skip
    if not traced:
        return
    hooks = [
        hook for place in (*_EVERYWHERE, layer._forward_pre_hooks, layer._forward_hooks) for hook in place.values()
    ]
    if hooks:
        name = getattr(hooks[0], "__qualname__", type(hooks[0]).__name__)
        raise refused(gate, f"{role} has a forward hook, {name}", "a trace would drop it", _ON_HOOKS)
    if layer.training:
        raise refused(gate, f"{role} is in training mode when the model is exported",
                      "a trace takes what it computes in evaluation",
                      "make it a submodule of the model, and let model.eval() reach it")  # fmt: skip
