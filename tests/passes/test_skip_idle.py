"""What an empty list leaves unchanged goes under a conditional, and only that."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import check, data, graph, ops, run

from dvexport.passes.clean_up import CleanUp
from dvexport.passes.skip_idle import SkipIdle

GATHERED = "list = NonZero(mask) at = Gather(table, list) read = Gather(x, at)"
SCATTERED = f"{GATHERED} new = Neg(read) last = Constant<value_ints=[-1]>() to = Unsqueeze(at, last)"


def skip(body, outputs="float[6,3] y"):
    """Run the pass; compare with the graph before it where nothing, something and everything is listed."""
    model = graph(
        f"g (float[6,3] x, float[6,3] other, bool[4] mask, bool[4] owed, int64[4] table) => ({outputs}) {{ {body} }}",
        table=np.array([0, 2, 3, 5]),
    )
    before = model.clone()
    modified = SkipIdle()(model).modified
    check(model)
    CleanUp()(model)  # which names what lies in branches
    for count in range(5):
        mask = np.arange(4) < count
        feeds = {"x": data(6, 3), "other": data(6, 3, seed=1), "mask": mask, "owed": mask & (np.arange(4) > 1)}
        expected, found = run(before, **feeds), run(model, **feeds)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
    return model, modified


def branches(model):
    """Operators of the only conditional's branches: taken with entries, taken without."""
    (node,) = (node for node in model.graph if node.op_type == "If")
    return tuple([inner.op_type for inner in node.attributes[f"{name}_branch"].as_graph()] for name in ("then", "else"))


def test_wraps_what_depends_on_the_list():
    model, modified = skip(f"{SCATTERED} y = ScatterND(other, to, new)")
    assert modified
    assert ops(model) == ["NonZero", "Size", "Cast", "If"]
    assert branches(model) == (["Gather", "Gather", "Neg", "Unsqueeze", "ScatterND"], ["Identity"])


def test_takes_in_what_nothing_else_reads():
    model, _ = skip(
        f"""{SCATTERED} zero = Constant<value_int=0>() e = Exp(other) row = Gather(e, zero) sum = Add(new, row)
            y = ScatterND(other, to, sum)"""
    )
    assert {"Exp", "Add"} < set(branches(model)[0])
    assert "Exp" not in ops(model)


def test_makes_a_base_of_its_own_in_both_branches():
    model, _ = skip(f"{SCATTERED} base = Relu(other) y = ScatterND(base, to, new)")
    taken, empty = branches(model)
    assert "Relu" in taken
    assert empty == ["Relu"]
    assert "Relu" not in ops(model)


def test_results_leave_together():
    model, _ = skip(
        f"{SCATTERED} v = ScatterND(x, to, new) again = Gather(v, at) more = Exp(again) y = ScatterND(other, to, more)",
        "float[6,3] v, float[6,3] y",
    )
    assert ops(model).count("If") == 1
    assert branches(model)[1] == ["Identity", "Identity"]


def test_a_scatter_into_a_scatter_keeps_the_first_base():
    model, _ = skip(f"{SCATTERED} one = ScatterND(other, to, new) two = Exp(new) y = ScatterND(one, to, two)")
    assert branches(model)[1] == ["Identity"]


def test_a_list_within_a_list_is_wrapped_first():
    model, _ = skip(
        f"""{SCATTERED} few = NonZero(owed) fewer = Gather(table, few) some = Gather(x, fewer) late = Exp(some)
            where = Unsqueeze(fewer, last) old = ScatterND(other, where, late) kept = Gather(old, at)
            sum = Add(kept, new) y = ScatterND(other, to, sum)"""
    )
    assert ops(model) == ["NonZero", "Size", "Cast", "If"]
    assert branches(model)[0].count("If") == 1


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (f"{GATHERED} y = Neg(read)", "float[1,n,3] y"),  # leaves without a scatter
        (f"{SCATTERED} y = ScatterND(other, to, new) z = Exp(new)", "float[6,3] y, float[1,n,3] z"),
        (  # the scatter's indices are not the list: they have entries where it has none
            f"""{GATHERED} first = Constant<value_ints=[0]>() at0 = Unsqueeze(first, first)
                one = Constant<value_ints=[1,3]>() sum = ReduceSum<keepdims=0>(read) row = Expand(sum, one)
                y = ScatterND(other, at0, row)""",
            "float[6,3] y",
        ),
    ],
)
def test_leaves_what_an_empty_list_would_change(body, outputs):
    model, modified = skip(body, outputs)
    assert not modified
    assert "If" not in ops(model)


def test_leaves_a_region_that_another_node_passes_through():
    model, modified = skip(
        f"""{SCATTERED} v = ScatterND(other, to, new) outside = Softmax(v) rows = Gather(outside, at)
            y = ScatterND(outside, to, rows)"""
    )
    assert not modified
    assert "If" not in ops(model)
