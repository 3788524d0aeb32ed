"""What a backend is: how it makes an artifact of a traced model, and opens the one in a bundle."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dvexport.bundle.limits import Limits
from dvexport.errors import UsageError
from dvexport.graph.weights import WeightFile
from dvexport.targets.catalogue import Target
from dvexport.targets.runtime import Variant

if TYPE_CHECKING:
    import onnx_ir as ir

    from dvexport.bundle.archive import Bundle
    from dvexport.bundle.manifest import Manifest
    from dvexport.passes.pipeline import BackendPasses, Lowered, Request

__all__ = ["Backend", "Built", "Progress", "not_available"]

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Built:
    """What a backend made of a model.

    Attributes:
        lowered: the gated variant's graph, as it was handed to the backend.
        variant: the gated variant, to be opened on this machine.
        forced: makes the variant whose decisions are inputs, of the same lowerings, to be opened on this machine.
        files: what the bundle gets, by name.
        memory: bytes on the device by use, where the backend knows them.
        weights: those that the files refer to as `dvexport.graph.weights.WEIGHTS`, empty where each file holds its
            own; and what the files hold that graphs may refer to.
        aligned: names of those files that start at a multiple of `dvexport.graph.weights.ALIGNMENT` inside the bundle,
            for whoever maps it. Files of weights, which are called `weights.bin`, always do.
    """

    lowered: Lowered
    variant: Variant
    forced: Callable[[], Variant]
    files: Mapping[str, bytes | memoryview | Path]
    memory: Mapping[str, int] = field(default_factory=dict)
    weights: WeightFile = field(default_factory=WeightFile)
    aligned: Collection[str] = ()


class Backend(Protocol):
    """A backend.

    Attributes:
        tools: packages whose versions have a part in an artifact.
        passes: what it adds to the passes that every backend shares.
        rank: its place where no backend is asked for; the least is tried first.
        remedy: what to try where an artifact is no faster than its dense version, a sentence.
        loading: how an unpacked artifact is loaded without dvexport, a clause.
    """

    tools: tuple[str, ...]
    passes: BackendPasses
    rank: int
    remedy: str
    loading: str

    def check(self, device: Target, lowering: Mapping[str, str]) -> None:
        """Raise UsageError where a request can't be met, DeviceError where a package is missing."""

    def at_opset(self, device: Target, opset: int) -> Target:
        """Return a device whose artifacts are written in an opset of ONNX; UsageError where it can't read that."""

    def limits(self, outputs: Sequence[str]) -> Limits:
        """Return how far an artifact may be from its model, by the names of the model's outputs."""

    def build(
        self, traced: ir.Model, plan: Request, device: Target, tell: Progress, dense: ir.Model | None = None
    ) -> Built:
        """Lower a traced model as `plan` says and make its artifact.

        Args:
            dense: the model without pruning, where it had to be traced apart since its shapes differ.
        """

    def variant(self, bundle: Bundle, variant: str) -> Variant:
        """Return a variant of a bundle: `gated`, `dense` or `forced`."""

    def needed(self, bundle: Bundle) -> Mapping[str, int]:
        """Return the files that a device needs to run the gated variant, and how many bytes of each from its start."""

    def runtime(self, manifest: Manifest) -> tuple[str, str]:
        """Return the name and version of what executes a bundle's artifact on this machine."""


def not_available(what: str, device: Target) -> UsageError:
    """Return the error for a device that a backend's artifacts do not run on."""
    return UsageError(
        f"target '{device.name}' does not run {what}",
        why=f"its runtimes are: {', '.join(device.backends)}",
    )
