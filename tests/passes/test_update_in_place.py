"""States written where they are read: by whom, and that it changes nothing."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from graphs import check, data, graph, ops

from dvexport.graph.state import add_state, states_of
from dvexport.passes import update_in_place
from dvexport.passes.update_in_place import UpdateInPlace
from dvexport.targets.onnx.emit import emit
from dvexport.targets.onnx.runtime import OrtSession

LISTED = """list = NonZero(mask) at = Gather(table, list) all = Constant<value_ints=[-1]>() flat = Reshape(at, all)
            picked = Gather(x, at) new = Neg(picked) to = Unsqueeze(at, all)"""
READ = "old = Gather(v, flat)"
SCATTERED = "next = ScatterND(v, to, new)"


def stream(body, *, least=0):
    """Run the pass over a stream whose state `v` `[9, 3]` becomes `next`; tell whether it was marked."""
    model = graph(
        f"""g (float[9,3] x, bool[4] mask, float[9,3] v, int64[4,2] table) => (float y, float[9,3] next) {{
            {body} y = ReduceSum<keepdims=0>(seen) }}""",
        table=np.array([[0, 1], [2, 3], [4, 5], [6, 7]]),
    )
    read = next(value for value in model.graph.inputs if value.name == "v")
    write = model.graph.outputs.pop()
    read.name = "s.in"
    add_state(model, "s", read, write)
    with patch.object(update_in_place, "_LARGE", least):
        modified = UpdateInPlace()(model).modified
    check(model)
    (state,) = states_of(model)
    assert state.in_place == modified
    return model, modified


def assert_same(model):
    """One buffer or two: the same outputs and states, over random lists, none and all of the tiles."""
    (state,) = states_of(model)
    text = emit(model)
    one, two = OrtSession(text, [state]), OrtSession(text, [replace(state, in_place=False)])
    random = np.random.default_rng(0)
    for step in range(12):
        mask = random.random(4) < (0.5, 0.0, 1.0)[step % 3]
        feeds = {"x": data(9, 3, seed=step), "mask": mask}
        found, expected = one.run(feeds), two.run(feeds)
        np.testing.assert_array_equal(found["y"], expected["y"])
        np.testing.assert_array_equal(*(s._buffers[s._turn][state.input] for s in (one, two)))
    assert one._buffers[0][state.input] is one._buffers[1][state.input]


def what_makes(value):
    """The nodes that a value depends on."""
    found, todo = [], [value.producer()]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.append(node)
            todo += [each.producer() for each in node.inputs if each is not None]
    return found


@pytest.mark.parametrize("body", [f"{READ} {SCATTERED}", f"{SCATTERED} {READ}"])
def test_what_is_read_is_read_before(body):
    """Whatever the order of the nodes was, what is written where depends on what was read."""
    model, marked = stream(f"{LISTED} {body} seen = Neg(old)")
    assert marked
    scatter = next(node for node in model.graph if node.op_type == "ScatterND")
    readers = [node for node in what_makes(scatter.inputs[1]) if node.inputs and node.inputs[0].name == "s.in"]
    assert [node.op_type for node in readers] == ["Gather"]
    assert_same(model)


def test_what_nobody_reads_is_only_marked():
    model, marked = stream(f"{LISTED} {SCATTERED} seen = Neg(new)")
    assert marked
    assert ops(model).count("Shape") == 0
    _, marked = stream(f"{LISTED} seen = Neg(new) {SCATTERED}", least=28)
    assert not marked


def test_values_that_are_flat_already_are_not_reshaped_again():
    fresh = "rows = Constant<value_ints=[-1,3]>() vector = Reshape(new, rows)"
    model, marked = stream(f"{LISTED} {fresh} {READ} {SCATTERED} seen = Add(old, vector)")
    assert marked
    assert ops(model).count("Reshape") == 3  # one each for the list, the values and the index
    assert_same(model)


@pytest.mark.parametrize(
    "body",
    [
        f"{READ} {SCATTERED} seen = Add(old, v)",  # read twice beside
        f"same = Gather(v, at) {SCATTERED} seen = Neg(same)",  # as many rows, in another shape
        f"few = Gather(v, list) {SCATTERED} seen = Neg(few)",  # other rows
        f"side = Gather<axis=1>(v, flat) {SCATTERED} seen = Neg(side)",
        f"{SCATTERED} seen = Neg(v)",  # all rows
        "seen = Neg(picked) next = ScatterND(x, to, new)",  # into something else
        'seen = Neg(picked) next = ScatterND<reduction="add">(v, to, new)',
        "seen = Neg(picked) next = Neg(v)",
    ],
)
def test_left_alone(body):
    model, marked = stream(f"{LISTED} {body}")
    assert not marked
    assert "Shape" not in ops(model)
