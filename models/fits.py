"""Whether a model's weights fit into this machine, told before memory is taken for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from dvexport.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check_fits", "weight_bytes_of"]


def weight_bytes_of(name: str, make: Callable[[], nn.Module]) -> int:
    """Return the bytes of the parameters and tables of the model that `make` builds; no memory is taken for them.

    Raises:
        UsageError: it can't be built: its sizes are those of no model.
    """
    import torch

    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = make()
    except UsageError:
        raise
    except (RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise UsageError(f"no {name} can be built with these options", why=str(error).splitlines()[0]) from error
    return sum(
        value.numel() * value.element_size() for values in (model.parameters(), model.buffers()) for value in values
    )


def check_fits(name: str, make: Callable[[], nn.Module]) -> None:
    """Raise UsageError if the weights of the model that `make` builds are more than this machine has memory."""
    has = _physical_memory()
    if has is not None and (needs := weight_bytes_of(name, make)) > has:
        raise UsageError(
            f"{name} with these options does not fit into this machine",
            why=f"its weights take {needs >> 20} MiB of memory, and there are {has >> 20}",
            hint="set smaller ones",
        )


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
