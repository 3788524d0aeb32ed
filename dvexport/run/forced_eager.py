"""PyTorch under forced decisions: the reference that lowerings are compared with, whatever a clip makes gates decide.

`gates.forced_decisions` reaches the gated convolutions alone. A model may use a decision elsewhere too, and the forced
variant of its graph follows the forced one there (`ForceDecisions`). So the model runs twice: once to see which call
of torch made each decision, then with the result of that call replaced. Its calls are the same both times, as no
Python branch of a model that can be traced depends on a tensor's values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from dvexport import gates
from dvexport.decisions import Key

__all__ = ["forced_outputs"]


def forced_outputs(
    model: nn.Module, inputs: Sequence[Tensor], decisions: Mapping[Key, Tensor]
) -> tuple[Any, frozenset[Key]]:
    """Run a model on a clip, eager and in evaluation mode, with its decisions forced.

    Args:
        inputs: in the order of forward, T frames each.
        decisions: by gate and kind: `action` int64 `[T, C]`, `tiles` bool `[T, gh, gw]`.

    Returns:
        What forward gives, and the decisions that only gated convolutions followed, since no call of torch that can
        be seen made them: a use of them elsewhere has kept the model's own.
    """
    model = model.eval()
    first = _Calls({})
    with torch.no_grad(), first, gates.forced_decisions(decisions, first.read):
        model(*inputs)
    again = _Calls({place: decisions[key] for place, key in first.found.items() if key in decisions})
    with torch.no_grad(), again, gates.forced_decisions(decisions, again.read):
        result = model(*inputs)
    return result, frozenset(first.unseen & decisions.keys())


class _Calls(TorchFunctionMode):
    """Counts the calls of torch, notes which of them made a decision, and replaces what they gave.

    Args:
        replaced: by the number of a call and the place among its results.

    Attributes:
        found: the decision that a gate read, by where it was made.
        unseen: decisions that no call was seen to make, or that a view of them was written to afterwards.
    """

    def __init__(self, replaced: Mapping[tuple[int, int], Tensor]) -> None:
        super().__init__()
        self.found: dict[tuple[int, int], Key] = {}
        self.unseen: set[Key] = set()
        self._replaced = replaced
        self._count = 0
        self._made: WeakKeyDictionary[Tensor, tuple[tuple[int, int], int]] = WeakIdKeyDictionary()  # type: ignore[assignment]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call, note the tensors that come back, and replace those that are to be."""
        result = func(*args, **(kwargs or {}))
        number, self._count = self._count, self._count + 1
        if getattr(func, "__name__", "") == "__setitem__":
            self._noted(args[0], (number, 0), args, func)
        if isinstance(result, Tensor):
            return self._noted(result, (number, 0), args, func)
        if isinstance(result, (tuple, list)) and any(isinstance(one, Tensor) for one in result):
            noted = [self._noted(one, (number, i), args, func) for i, one in enumerate(result)]
            return type(result)(noted) if type(result) in (tuple, list) else result
        return result

    def read(self, gate: str, kind: str, own: Tensor) -> None:
        """Note what made a decision; floats are made a decision of by the gate alone, as in a trace."""
        if own.is_floating_point():
            return
        call, version = self._made.get(own, (None, 0))
        if call is None or version != own._version:
            self.unseen.add((gate, kind))
        else:
            self.found.setdefault(call, (gate, kind))

    def _noted(self, own: Any, place: tuple[int, int], args: tuple[Any, ...], func: Any) -> Any:
        """Return the forced decision in the type of the model's; what was changed in place stays the same tensor.

        A conversion to the type that a tensor has gives the tensor itself: it makes nothing, unless a view of the
        tensor was written to meanwhile.
        """
        if not isinstance(own, Tensor):
            return own
        given = any(own is one for one in args)
        changed = _writes(func) or (own in self._made and self._made[own][1] != own._version)
        if given and own in self._made and not changed:
            return own
        forced = self._replaced.get(place)
        if forced is not None and forced.shape == own.shape:
            own = own.copy_(forced) if given and changed else forced.to(own.dtype, copy=True)
        self._made[own] = place, own._version
        return own


def _writes(func: Any) -> bool:
    """Tell whether a function of torch changes its argument: `add_`, `__iadd__` and `__setitem__` do, `to` does not."""
    name = getattr(func, "__name__", "")
    if name.endswith("__"):
        return name == "__setitem__" or name.startswith("__i")
    return name.endswith("_")
