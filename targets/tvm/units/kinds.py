"""What a kind of unit is: one declaration, of which everything else asks.

A kind is declared where its units are found: `@FAMILY.kind("avg_pool", ops=("AveragePool",), role=Role.DECIDE)` stands
before the function that makes a unit of a node, or returns None where no kernel fits. Its writer, a floor up, is
registered by the same name (`calls/writers.py`). A profile asks for the role, the benchmark of what gates cost for the
purpose. `units/catalogue.py` lists the families in the order in which their kinds are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import onnx_ir as ir

from dvexport.targets.tvm.units.unit import Unit

__all__ = ["Family", "Image", "Kind", "Match", "Purpose", "Role", "operator_name"]

Match = Callable[[ir.Node, Collection[ir.Value]], Unit | None]
"""Returns the unit that starts at a node; the second argument is the images of the model (`planes.py`)."""


class Role(StrEnum):
    """What a call is there for, in the words of a profile (`targets/roles.py`)."""

    COMPUTE = "compute"
    DECIDE = "decide"
    MOVE = "move"
    OTHER = "other"


class Purpose(StrEnum):
    """What a call inside a gate, but outside its convolutions, is part of the gate's price for."""

    POLICIES = "policies"
    LISTS = "lists"
    MERGES = "merges"
    COPIES = "copies"


class Image(StrEnum):
    """Whether the results of a node are images that kernels over planes may read (`planes.images_of`)."""

    MAKES = "makes"
    """They are, whatever the node reads."""
    KEEPS = "keeps"
    """They are where all that the node reads is images too."""
    NONE = "none"


@dataclass(frozen=True)
class Kind:
    """A kind of unit, or of a call that serves units.

    Attributes:
        name: also the first word of the labels of its calls.
        role: for profiles.
        planar: whether its results are held as planes.
        image: whether its nodes make images.
        purpose: for the benchmark of what gates cost.
        flat: whether its units are only found where no result is an image and every shape is known.
        ops: operators that a unit starts at, as `Relu` or, of the dialect, `dv.Merge`.
        match: makes the unit of a node; None: it has no node (an island is what is left over; calls that serve units).
    """

    name: str
    role: Role
    planar: bool = False
    image: Image = Image.NONE
    purpose: Purpose = Purpose.POLICIES
    flat: bool = False
    ops: tuple[str, ...] = ()
    match: Match | None = None

    def starts_at(self, node: ir.Node) -> bool:
        """Tell whether a unit of this kind may start at a node."""
        return operator_name(node) in self.ops


@dataclass
class Family:
    """Kinds that are declared in one module, in the order in which they are tried."""

    kinds: list[Kind] = field(default_factory=list)

    def kind(
        self,
        name: str,
        *,
        ops: Sequence[str],
        role: Role,
        planar: bool = False,
        image: Image = Image.NONE,
        purpose: Purpose = Purpose.POLICIES,
        flat: bool = False,
    ) -> Callable[[Match], Match]:
        """Declare a kind; decorates the function that makes its units. The arguments are those of `Kind`."""

        def declare(match: Match) -> Match:
            self.kinds.append(Kind(name, role, planar, image, purpose, flat, tuple(ops), match))
            return match

        return declare

    def __iter__(self) -> Iterator[Kind]:
        return iter(self.kinds)


def operator_name(node: ir.Node) -> str:
    """Return `Relu` for a standard operator, `dv.Merge` for one of the dialect."""
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
