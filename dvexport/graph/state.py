"""The states of a stream: pairs of a graph input and a graph output, listed in the model's metadata.

The host feeds each output back to its input at the next step, and zeros at the first.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

import onnx_ir as ir

from dvexport.decisions import PROBE, decision_key
from dvexport.errors import TraceError
from dvexport.graph.graph import fresh_output, static_shape

__all__ = ["State", "add_state", "mark_in_place", "remove_state", "results_of", "state_input", "states_of"]

_KEY = "dv.states"


@dataclass(frozen=True)
class State:
    """One state: `shape` and `dtype` (NumPy's name) of what is fed back; it starts as zeros.

    Attributes:
        in_place: the output may have the memory of the input (`passes/update_in_place.py`).
    """

    name: str
    input: str
    output: str
    shape: tuple[int, ...]
    dtype: str
    init: str = "zeros"
    in_place: bool = False


def states_of(model: ir.Model) -> list[State]:
    """Return the states of a model in stream mode, in the order they were added."""
    rows = json.loads(model.metadata_props.get(_KEY, "[]"))
    return [State(**{**row, "shape": tuple(row["shape"])}) for row in rows]


def results_of(model: ir.Model) -> list[ir.Value]:
    """Return the outputs that are neither states nor decisions shown: what the model is for."""
    states = {state.output for state in states_of(model)}
    return [
        value
        for value in model.graph.outputs
        if value.name not in states and decision_key(value.name or "", PROBE) is None
    ]


def state_input(model: ir.Model, name: str, like: ir.Value) -> ir.Value:
    """Add the input half of state `name`; `add_state` completes it."""
    value = ir.Value(name=f"{name}.in", shape=like.shape, type=like.type)
    model.graph.inputs.append(value)
    return value


def add_state(model: ir.Model, name: str, read: ir.Value, write: ir.Value) -> None:
    """Complete state `name`: `read` is its graph input, `write` its next value.

    Raises:
        TraceError: there is a state of that name.
    """
    if any(state.name == name for state in states_of(model)):
        raise TraceError(
            f"two states are called '{name}'",
            why="two delays have one name, or two convolutions with actions belong to one gate",
            hint="give each a name of its own",
        )
    assert read.name is not None and read.dtype is not None
    write.shape, write.type = read.shape, read.type
    output = fresh_output(model.graph, f"{name}.out", write)
    assert output.name is not None
    state = State(name, read.name, output.name, static_shape(read), str(read.dtype.numpy()))
    _store(model, [*states_of(model), state])


def mark_in_place(model: ir.Model, names: Collection[str]) -> None:
    """Say that a step may write these states, and no others, where it reads them."""
    _store(model, [replace(state, in_place=state.name in names) for state in states_of(model)])


def remove_state(model: ir.Model, name: str) -> tuple[ir.Value, ir.Value]:
    """Forget state `name`; return its input and output, both no longer part of the graph's interface."""
    (state,) = (s for s in states_of(model) if s.name == name)
    read = next(v for v in model.graph.inputs if v.name == state.input)
    write = next(v for v in model.graph.outputs if v.name == state.output)
    model.graph.inputs.remove(read)
    model.graph.outputs.remove(write)
    read.name, write.name = f"{name}.was_in", f"{name}.was_out"
    _store(model, [s for s in states_of(model) if s.name != name])
    return read, write


def _store(model: ir.Model, states: list[State]) -> None:
    model.metadata_props[_KEY] = json.dumps([asdict(state) for state in states])
