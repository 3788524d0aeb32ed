"""Every kind of unit, and of the calls that serve units."""

from __future__ import annotations

from dvexport.targets.tvm.units import attention, convolutions, images, linear, tokens
from dvexport.targets.tvm.units.kinds import Kind, Purpose, Role

__all__ = ["ISLAND", "KINDS", "MATCHED", "SERVING"]

ISLAND = Kind("island", Role.DECIDE)
"""What no kernel fits, compiled by Relax."""

MATCHED = (*attention.FAMILY, *linear.FAMILY, *tokens.FAMILY, *convolutions.FAMILY, *images.FAMILY)
"""Kinds that nodes are compared with, in this order: the largest patterns first."""

SERVING = (
    Kind("list", Role.DECIDE, purpose=Purpose.LISTS),
    Kind("mask", Role.DECIDE, purpose=Purpose.LISTS),
    Kind("load", Role.MOVE),
    Kind("store", Role.MOVE),
    Kind("clear", Role.MOVE, purpose=Purpose.COPIES),
    Kind("pad", Role.MOVE, purpose=Purpose.COPIES),
)
"""Calls that no unit is written as, but that prepare what units read: lists of decisions, other forms, padding."""

KINDS = {kind.name: kind for kind in (*MATCHED, ISLAND, *SERVING)}
"""All of them by name."""
