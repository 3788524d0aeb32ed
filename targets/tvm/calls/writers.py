"""Who writes the calls of which kind of unit; kinds are declared in `units/`, and every one of them has a writer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import onnx_ir as ir

from dvexport.targets.tvm.calls.draft import Draft
from dvexport.targets.tvm.units.unit import Unit

__all__ = ["Writers", "label_of"]

_Unit = TypeVar("_Unit", bound=Unit)


class Writers(dict[str, Callable[[Draft, Unit], None]]):
    """The writers of a module by the name of their kind; `write.py` joins them."""

    def writes(
        self, kind: str, of: type[_Unit]
    ) -> Callable[[Callable[[Draft, _Unit], None]], Callable[[Draft, _Unit], None]]:
        """Register a function as the writer of a kind.

        Args:
            kind: one that `units/catalogue.py` has.
            of: the class of its units.
        """

        def register(write: Callable[[Draft, _Unit], None]) -> Callable[[Draft, _Unit], None]:
            def checked(draft: Draft, unit: Unit) -> None:
                assert isinstance(unit, of), unit
                write(draft, unit)

            self[kind] = checked
            return write

        return register


def label_of(unit: Unit, value: ir.Value | None = None) -> str:
    """Return what a profile calls a unit's call.

    Args:
        unit: what the call is for.
        value: what the call makes; by default the unit's last output. The graph names it after the model's modules.
    """
    made = [*unit.outputs, *([] if value is None else [value])]
    return f"{unit.kind} {made[-1].name if made else ''}".strip()
