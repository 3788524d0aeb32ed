"""An ONNX Runtime session that keeps the states of a stream between steps.

Every state has two buffers. A step reads one and writes the other, the next step the other way round
(two I/O bindings, made once), so states are never copied and a step allocates nothing for them. A state that is
updated in place has one, bound as input and output: ONNX Runtime's `ScatterND` then writes only what is new.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dvexport.errors import DeviceError
from dvexport.targets.runtime import MOST_THREADS, Port, checked_threads

if TYPE_CHECKING:
    from dvexport.targets.onnx.times import NodeProfile
    from dvexport.targets.times import NodeTimes

__all__ = ["OnnxVariant", "OrtSession", "StateSpec"]

_DTYPES: dict[str, np.dtype] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(bool)": np.dtype(np.bool_),
}

_ERRORS_ONLY = 3


class StateSpec(Protocol):
    """What is needed to know of a state: `dvexport.graph.state.State` and the manifest's entry both fit."""

    @property
    def input(self) -> str:
        """Name of the graph input."""

    @property
    def output(self) -> str:
        """Name of the graph output that is the next step's input."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""

    @property
    def dtype(self) -> str:
        """NumPy's name of its type."""

    @property
    def in_place(self) -> bool:
        """Whether the output may have the memory of the input."""


class OrtSession:
    """A model in ONNX Runtime on the CPU, its states at zero.

    Args:
        model: the ONNX file.
        states: the states of a stream; none for a clip.
        weights: what the file refers to as external data, by name; used in place, not copied.
        threads: threads inside an operator; operators run one after another. 1 to `MOST_THREADS`, or to the cores of
            this machine if they are more.
        profile: record the time of every node, for `end_profile`; slows every step down.

    Attributes:
        inputs, outputs: what is fed and returned, states left out.
        seconds: duration of the last `run` inside the runtime.

    Raises:
        UsageError: no number of threads, or one outside the range.
        DeviceError: ONNX Runtime is missing, or can't load the model.
    """

    def __init__(
        self,
        model: bytes,
        states: Sequence[StateSpec] = (),
        *,
        weights: Mapping[str, np.ndarray] | None = None,
        threads: int = 1,
        profile: bool = False,
    ) -> None:
        threads = _checked(threads)
        self._profile_folder = tempfile.TemporaryDirectory(prefix="dvexport-") if profile else None
        self._optimised = Path(self._profile_folder.name if self._profile_folder else "") / "optimised.onnx"
        self._weights = dict(weights or {})  # the runtime reads them while it lives
        self._session = self._load(model, threads)
        self._check_states(states)
        state_inputs, state_outputs = {s.input for s in states}, {s.output for s in states}
        self.inputs = {port.name: _port(port) for port in self._session.get_inputs() if port.name not in state_inputs}
        self.outputs = {
            port.name: _port(port) for port in self._session.get_outputs() if port.name not in state_outputs
        }
        self.seconds = 0.0
        self._turn = 0
        # An OrtValue made from an array shares its memory, so filling the array resets the state.
        first = {s.input: np.zeros(s.shape, s.dtype) for s in states}
        second = {s.input: first[s.input] if s.in_place else np.zeros(s.shape, s.dtype) for s in states}
        self._buffers = [first, second]
        self._bindings = [self._bind(states, i) for i in range(2)]

    def reset(self) -> None:
        """Set every state to zero; DeviceError if the session is closed."""
        self._check_open()
        for buffer in self._buffers[self._turn].values():
            buffer.fill(0)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one step over `feeds` (every input, of its shape and type) and return the outputs.

        Raises:
            DeviceError: the runtime fails, or the session is closed.
        """
        self._check_open()
        binding = self._bindings[self._turn]
        try:
            arrays = [np.ascontiguousarray(array) for array in feeds.values()]  # alive until the run ends
            for name, array in zip(feeds, arrays, strict=True):
                binding.bind_cpu_input(name, array)
            start = time.perf_counter()
            self._session.run_with_iobinding(binding)
            self.seconds = time.perf_counter() - start
        except Exception as error:  # the runtime's exceptions share no base but this
            raise DeviceError("ONNX Runtime failed in a step", why=_first_line(error)) from error
        self._turn = 1 - self._turn
        values = binding.get_outputs()[-len(self.outputs) :]
        return {name: np.array(value.numpy()) for name, value in zip(self.outputs, values, strict=True)}

    def end_profile(self) -> NodeProfile:
        """Return what was recorded of all steps so far; recording ends."""
        import onnx

        from dvexport.targets.onnx.times import NodeProfile

        self._check_open()
        assert self._profile_folder is not None, "the session was not made with profile=True"
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        optimised = onnx.load_model(str(self._optimised), load_external_data=False)
        self._profile_folder.cleanup()
        return NodeProfile(events, optimised)

    def close(self) -> None:
        """Free everything; a closed session can't be used, and may be closed again."""
        self._bindings, self._buffers = [], []
        self._session, self._weights = None, {}
        if self._profile_folder is not None:
            self._profile_folder.cleanup()

    def _check_open(self) -> None:
        if self._session is None:
            raise DeviceError("the session is closed")

    def _load(self, model: bytes, threads: int) -> Any:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise DeviceError(
                "ONNX Runtime is not installed", why=str(error), hint="pip install onnxruntime"
            ) from error
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = _ERRORS_ONLY
        # Gated models have many short operators between the long ones, and a blocked thread takes longer to wake than
        # most of them run. After a step threads must not spin: they would take the cores of whoever is next.
        for key in ("session.intra_op.allow_spinning", "session.force_spinning_stop"):
            options.add_session_config_entry(key, "1")
        # It would look at the bytes, and read its own format too, which nobody has checked.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        if self._profile_folder is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._profile_folder.name) / "nodes")
            options.optimized_model_filepath = str(self._optimised)
            for key, value in (("file_name", "optimised.bin"), ("min_size_in_bytes", "1024")):
                options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
        if self._weights:
            held = [ort.OrtValue.ortvalue_from_numpy(array) for array in self._weights.values()]
            options.add_external_initializers(list(self._weights), held)
        try:
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # as above
            raise DeviceError(
                "ONNX Runtime can't load the model",
                why=_first_line(error),
                hint=f"this is onnxruntime {ort.__version__}; a newer one may know the model's operators",
            ) from error

    def _check_states(self, states: Sequence[StateSpec]) -> None:
        """Raise DeviceError for states that the model has not: memory is taken for them as they say."""
        reads, writes = ({port.name: port for port in ports} for ports in
                         (self._session.get_inputs(), self._session.get_outputs()))  # fmt: skip
        for state in states:
            read, write = reads.pop(state.input, None), writes.pop(state.output, None)
            if read is None or write is None:
                why = "the model has no such input and output, or they belong to two states"
            elif not _is(read, state) or not _is(write, state):
                ports = ", ".join(f"{port.type} {port.shape}" for port in (read, write))
                why = f"the model has {ports}, the list says {state.dtype} {list(state.shape)}"
            else:
                continue
            raise DeviceError("the list of states is not the model's", where=f"{state.input}, {state.output}", why=why)

    def _bind(self, states: Sequence[StateSpec], turn: int) -> Any:
        """Return the binding that reads buffer `turn` and writes the other."""
        import onnxruntime as ort

        binding = self._session.io_binding()
        for state in states:
            read, write = (self._buffers[i][state.input] for i in (turn, 1 - turn))
            binding.bind_ortvalue_input(state.input, ort.OrtValue.ortvalue_from_numpy(read))
            binding.bind_ortvalue_output(state.output, ort.OrtValue.ortvalue_from_numpy(write))
        for name in self.outputs:
            binding.bind_output(name)
        return binding


@dataclass(frozen=True)
class OnnxVariant:
    """A model as ONNX Runtime reads it, its states, and its weights where they are apart."""

    model: bytes
    states: Sequence[StateSpec]
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)

    def open(self, *, threads: int = 1, profile: bool = False) -> OrtSession:
        """Open it; see `OrtSession`."""
        return OrtSession(self.model, self.states, weights=self.weights, threads=threads, profile=profile)

    def times(self, recording: NodeProfile, gates: Collection[str], dense: OnnxVariant, passes: int) -> NodeTimes:
        """See `Variant`. What the dense version has below a gate's module is no part of the gate."""
        from dvexport.targets.onnx.times import child_scopes, gates_of_nodes, node_times

        owners = gates_of_nodes(self.model, gates, child_scopes(dense.model, gates))
        return node_times(recording, owners, passes)


def _checked(threads: int) -> int:
    """Return a number of threads; ONNX Runtime would start any, and take 0 as one a core."""
    most = max(MOST_THREADS, os.cpu_count() or 1)
    return checked_threads(
        threads, most, why=f"this machine has {os.cpu_count()} cores: more threads only wait for them"
    )


def _is(port: Any, state: StateSpec) -> bool:
    """Tell whether a port of the runtime is of a state's type and shape; sizes that the runtime leaves open fit."""
    sizes = zip(port.shape, state.shape, strict=False)
    fits = all(found == stated for found, stated in sizes if isinstance(found, int))
    return _DTYPES.get(port.type) == np.dtype(state.dtype) and len(port.shape) == len(state.shape) and fits


def _port(port: Any) -> Port:
    return Port(tuple(port.shape), _DTYPES[port.type])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
