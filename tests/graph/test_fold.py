"""What folding constants leaves alone."""

import numpy as np
import onnx_ir as ir
import pytest

from dvexport.graph.fold import fold_constants


def model(rows, chosen, width=256):
    """X plus rows of a table; and X times a sum of constants, which is folded whatever is left alone."""
    rng = np.random.default_rng(0)
    text = f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[{chosen}, {width}] x) => (float[{chosen}, {width}] y)
        {{
            taken = Gather (table, index)
            factor = Add (one, one)
            sum = Add (x, taken)
            y = Mul (sum, factor)
        }}
    """
    graph = ir.from_onnx_text(text)
    constants = {
        "table": rng.standard_normal((rows, width)).astype(np.float32),
        "index": rng.integers(0, rows, chosen),
        "one": np.ones(1, np.float32),
    }
    for name, array in constants.items():
        value = next(v for node in graph.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value, value.shape, value.dtype = ir.tensor(array), ir.Shape(array.shape), ir.tensor(array).dtype
        graph.graph.register_initializer(value)
    return graph


@pytest.mark.parametrize(
    ("rows", "chosen", "stays"), [(4, 64, True), (4, 8, False), (64, 64, False), (64, 32, False)], ids=str
)
def test_rows_taken_many_times_over_stay_a_table(rows, chosen, stays):
    """Not where little is made (8 KB), nor where the table is as large."""
    graph = model(rows, chosen)
    fold_constants(graph)
    assert [node.op_type for node in graph.graph] == (["Gather"] if stays else []) + ["Add", "Mul"]
