"""Profile a bundle: executed multiply-accumulates, measured time, and what one makes of the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvexport.profile.run import profile

__all__ = ["profile"]


def __getattr__(name: str) -> Any:
    # Reading or drawing a profile needs no runtime: it is imported with the first measurement.
    if name not in __all__:
        raise AttributeError(f"module 'dvexport.profile' has no attribute '{name}'")
    from dvexport.profile import run

    return getattr(run, name)
