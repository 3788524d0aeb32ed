"""The native artifact: one library and one file of weights, and a plan for every variant of the model.

The variants call the same kernels on the same weights. The dense one, and the one whose decisions are forced, cost a
plan of some kilobytes each and are shipped too, so that a device can measure what its gates save.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dvexport.bundle.trust import check_trust
from dvexport.errors import UsageError
from dvexport.graph.graph import gate_name
from dvexport.graph.weights import Place
from dvexport.targets.runtime import DEFAULT_THREADS, Port, Runtime
from dvexport.targets.tvm.build.compile import compile_kernels
from dvexport.targets.tvm.build.link import kernel_table, library_id, library_tasks, link_all
from dvexport.targets.tvm.calls.draft import ALGORITHMS
from dvexport.targets.tvm.calls.memory import Constants
from dvexport.targets.tvm.machine.machine import Machine
from dvexport.targets.tvm.native_files import HEADER, LIBRARY, NATIVE_WEIGHTS, RUNNER, plan_file
from dvexport.targets.tvm.plan_file import MAX_RANK, plan_bytes
from dvexport.targets.tvm.session import CallTime, NativeSession

if TYPE_CHECKING:
    import onnx_ir as ir

    from dvexport.bundle.archive import Bundle
    from dvexport.targets.times import NodeTimes

__all__ = ["NativeArtifact", "NativeVariant", "build_artifact", "read_variant"]

Progress = Callable[[str], None]


@dataclass(frozen=True)
class NativeVariant:
    """A plan with the library and the weights that it is for.

    Attributes:
        frames: how many one run takes; a plan that takes one frame is stepped through them.
    """

    library: bytes
    plan: bytes
    weights: bytes | memoryview
    frames: int

    def open(self, *, threads: int = 1, profile: bool = False) -> Runtime:
        """Open it; see `NativeSession`."""
        session = NativeSession(self.library, self.plan, self.weights, threads=threads, profile=profile)
        if next(iter(session.inputs.values())).shape[0] == self.frames:
            return session
        return _Clip(session, self.frames)

    def times(
        self, recording: Sequence[Sequence[CallTime]], gates: Collection[str], dense: NativeVariant, passes: int
    ) -> NodeTimes:
        """See `Variant`. A plan says itself to which gate a call belongs."""
        from dvexport.targets.tvm.times import call_times

        return call_times(recording, passes)


@dataclass(frozen=True)
class NativeArtifact:
    """What is shipped; see `build_artifact`.

    Attributes:
        plans: by name of the variant.
        memory: bytes that an instance of the gated variant takes: `arena`, `states`, `weights`, and `derived` for
            those that are made of them when it is opened; and `arena_bound`, what no placement could do without.
        held: where the weights of traced graphs are among `weights`, by digest.
    """

    library: bytes
    runner: bytes
    weights: memoryview
    plans: Mapping[str, bytes]
    memory: Mapping[str, int]
    held: Mapping[str, Place] = field(default_factory=dict)

    def files(self) -> dict[str, bytes | memoryview | Path]:
        """Return the files by their name in a bundle."""
        return {
            LIBRARY: self.library,
            RUNNER: self.runner,
            NATIVE_WEIGHTS: self.weights,
            HEADER: Path(__file__).parent / "runtime" / Path(HEADER).name,
            **{plan_file(name): plan for name, plan in self.plans.items()},
        }

    def variant(self, name: str, frames: int) -> NativeVariant:
        """Return a variant, to be opened on this machine."""
        return NativeVariant(self.library, self.plans[name], self.weights, frames)


def build_artifact(
    models: Mapping[str, ir.Model],
    machine: Machine,
    tell: Progress,
    algorithms: Collection[str] = ALGORITHMS,
    threads: int = DEFAULT_THREADS,
) -> NativeArtifact:
    """Compile the variants of a model.

    Args:
        models: lowered for kernels, by name: `gated`, `dense`, `forced`.
        machine: what to compile for.
        tell: called with the name of each step as it begins.
        algorithms: the algorithms of convolutions to choose from at run time.
        threads: the most that may share a step; 1 to `MOST_THREADS`.

    Raises:
        UsageError: an operator that no kernel can be made for, an input or output of too many axes.
        DeviceError: a package of the extra `tvm` is missing, or fails.
    """
    from dvexport.targets.tvm.calls.place import place
    from dvexport.targets.tvm.calls.write import write_draft

    _check_ranks(models["gated"])
    tell("select kernels")
    constants = Constants()
    gates = {gate_name(node) for node in models["gated"].graph} - {""}
    drafts = {
        name: write_draft(model, machine, constants, gates, algorithms, threads) for name, model in models.items()
    }
    placed = {name: place(draft) for name, draft in drafts.items()}
    kernels = {name: kernel for draft in drafts.values() for name, kernel in draft.calls.kernels.items()}
    objects = compile_kernels(kernels.values(), machine, tell, library_tasks(machine))
    tell("link")
    table = kernel_table(kernels.values())
    weights = constants.file()
    identity = library_id(objects, table, machine)
    library, runner = link_all(objects, table, machine)
    gated = placed["gated"].plan
    memory = {
        "arena": gated.arena,
        "arena_bound": placed["gated"].arena_bound,
        "states": gated.state + 2 * gated.flip,
        "weights": len(weights),
        "derived": gated.derived,
    }
    return NativeArtifact(
        library=library,
        runner=runner,
        weights=weights,
        plans={name: plan_bytes(each.plan, table, identity, weights) for name, each in placed.items()},
        memory=memory,
        held=constants.held,
    )


def _check_ranks(model: ir.Model) -> None:
    """Refuse what `dvx_port` has no room for."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and len(value.shape) > MAX_RANK:
            raise UsageError(
                f"the native runtime takes inputs and outputs of up to {MAX_RANK} axes",
                where=value.name,
                why=f"it has {len(value.shape)}",
                hint="reshape it in the model, or export with another backend: --backend onnx",
            )


def read_variant(bundle: Bundle, name: str) -> NativeVariant:
    """Return a variant of a bundle; BundleError if it lacks a file, or its code may not be loaded here."""
    check_trust(bundle)
    library, plan = bundle.read(LIBRARY), bundle.read(plan_file(name))
    weights, frames = bundle.array(NATIVE_WEIGHTS), bundle.manifest.inputs[0].shape[0]
    return NativeVariant(library, plan, weights.data, frames)


class _Clip:
    """A stream that runs whole clips: from a reset, frame by frame, which gives exactly the clip's result."""

    def __init__(self, session: NativeSession, frames: int) -> None:
        self._session, self._frames = session, frames
        self.inputs, self.outputs = self._ports(session.inputs), self._ports(session.outputs)
        self.seconds = 0.0

    def reset(self) -> None:
        """Nothing crosses clips."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run all frames."""
        self._session.reset()
        self.seconds, steps = 0.0, []
        for index in range(self._frames):
            steps.append(self._session.run({name: array[index : index + 1] for name, array in feeds.items()}))
            self.seconds += self._session.seconds
        return {name: np.concatenate([step[name] for step in steps]) for name in steps[0]}

    def end_profile(self) -> Any:
        """Return what was recorded of all steps."""
        return self._session.end_profile()

    def close(self) -> None:
        """See `NativeSession`."""
        self._session.close()

    def _ports(self, ports: Mapping[str, Port]) -> dict[str, Port]:
        return {name: Port((self._frames, *port.shape[1:]), port.dtype) for name, port in ports.items()}
