"""Each operator's reference, run in ONNX Runtime, against NumPy written from the specification."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from graphs import data, graph, node_of, run, weights

from dvexport.dialect import OPERATORS, attach_references, operator_of
from dvexport.dialect.masks import tile_index
from dvexport.geometry import output_size

N, CIN, COUT, SIZE, GRID = 3, 4, 6, (7, 9), (3, 2)
CONV = {"strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1)}


def conv_np(x, w, b=None, *, strides, pads, dilations):
    """Sum over kernel positions."""
    height, width = output_size(
        x.shape[2:], w.shape[2:], CONV | {"strides": strides, "pads": pads, "dilations": dilations}
    )
    padded = np.pad(x, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    y = np.zeros((len(x), len(w), height, width), np.float64)
    for i, j in itertools.product(range(w.shape[2]), range(w.shape[3])):
        top, left = i * dilations[0], j * dilations[1]
        window = padded[
            :, :, top : top + strides[0] * height : strides[0], left : left + strides[1] * width : strides[1]
        ]
        y += np.einsum("nchw,oc->nohw", window[:, :, :height, :width], w[:, :, i, j])
    return y if b is None else y + b.reshape(1, -1, 1, 1)


def upsample_np(tiles, size):
    """Pixel by pixel: cell floor(y * grid / size)."""
    out = np.zeros((len(tiles), 1, *size), bool)
    for y, x in itertools.product(range(size[0]), range(size[1])):
        out[:, 0, y, x] = tiles[:, y * tiles.shape[1] // size[0], x * tiles.shape[2] // size[1]]
    return out


def subsets(*names):
    return [set(c) for k in range(len(names) + 1) for c in itertools.combinations(names, k)]


def values(seed=0):
    """An array for every input of the convolutions."""
    rng = np.random.default_rng(seed)
    return {
        "B": data(COUT, seed=2),
        "action": rng.integers(0, 3, (N, COUT)),
        "tiles": rng.random((N, *GRID)) < 0.5,
        "init_history": data(1, COUT, *SIZE, seed=3),
        "rows": rng.random((N, COUT)) < 0.5,
        "residual": data(N, COUT, *SIZE, seed=4),
        "base": data(N, COUT, *SIZE, seed=5),
        "V": data(N, COUT, *SIZE, seed=6),
        "H": data(N, COUT, *SIZE, seed=7),
        "X": data(N, CIN, *SIZE, seed=8),
    }


TYPES = {"action": "int64", "tiles": "bool", "rows": "bool", "active_in": "bool"}


def one_op(name, given, arrays, *, outputs=("y",), attributes="", rename=None):
    """A graph of a single operator; inputs not in `given` are left out."""
    operator = OPERATORS[name]
    names = [n.rstrip("?") for n in operator.inputs]
    last = max(i for i, n in enumerate(names) if n in given)
    arguments = ", ".join(n if n in given else "" for n in names[: last + 1])
    dims = {n: ",".join(map(str, arrays[n].shape)) for n in names if n in given}
    inputs = ", ".join(f"{TYPES.get(n, 'float')}[{dims[n]}] {n}" for n in names if n in given)
    results = ", ".join(f"float[n{i},c{i},h{i},w{i}] {o}" for i, o in enumerate(outputs))
    if name in ("ToRows", "FrameMean"):
        results = "float[r,c] y"
    text = f"g ({inputs}) => ({results}) {{ {', '.join(outputs)} = dv.{name}<{attributes}>({arguments}) }}"
    constants = {"W": arrays["W"]} if "W" in given else {}
    model = graph(text.replace("<>", ""), **constants)
    (node,) = (node for node in model.graph if node.domain == "dv")
    for output in node.outputs:
        output.shape = None
    operator.infer(node)
    return model, {n: arrays[n] for n in names if n in given and n != "W"}


LEGAL = [s for s in subsets("B", "action", "tiles", "init_history") if "init_history" not in s or "action" in s]


@pytest.mark.parametrize("given", LEGAL, ids=lambda s: "+".join(sorted(s)) or "none")
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_gated_conv(given, activation):
    arrays = values() | {"W": weights(COUT, CIN, 3)}
    model, feeds = one_op("GatedConv", {"X", "W"} | given, arrays, outputs=("y", "last"),
                          attributes=f'gate="g", pads=[1,1,1,1], activation="{activation}"')  # fmt: skip
    v = conv_np(arrays["X"], arrays["W"], arrays["B"] if "B" in given else None, **CONV)
    v = np.maximum(v, 0) if activation == "relu" else v
    u = v.copy()
    if "action" in given:
        first = arrays["init_history"] if "init_history" in given else np.zeros_like(v[:1])
        for n, c in itertools.product(range(N), range(COUT)):
            history = (v[n - 1] if n else first[0])[c]
            u[n, c] = {0: 0 * history, 1: history, 2: v[n, c]}[int(arrays["action"][n, c])]
    if "tiles" in given:
        u = u * upsample_np(arrays["tiles"], SIZE)
    outputs = run(model, **feeds)
    np.testing.assert_allclose(outputs["y"], u, atol=1e-5)
    np.testing.assert_allclose(outputs["last"], v[-1:], atol=1e-5)
    assert node_of(model, "GatedConv").outputs[0].shape == [N, COUT, *SIZE]


def test_gated_conv_ignores_active_in():
    """A promise changes no number while it holds."""
    arrays = values() | {"W": weights(COUT, CIN, 3), "active_in": np.array([[True, False, True, False]] * N)}
    arrays["X"] = arrays["X"] * arrays["active_in"][:, :, None, None]
    attributes = 'gate="g", pads=[1,1,1,1]'
    model, feeds = one_op("GatedConv", {"X", "W", "active_in"}, arrays, attributes=attributes)
    np.testing.assert_allclose(run(model, **feeds)["y"], conv_np(arrays["X"], arrays["W"], **CONV), atol=1e-5)


@pytest.mark.parametrize(
    ("strides", "pads", "dilations", "kernel"),
    [
        ((2, 2), (1, 1, 1, 1), (1, 1), 3),
        ((2, 1), (0, 1, 1, 0), (1, 1), 3),
        ((1, 1), (2, 2, 2, 2), (2, 2), 3),
        ((1, 2), (0, 0, 0, 0), (1, 1), 1),
    ],
)
def test_conv_geometry(strides, pads, dilations, kernel):
    arrays = values() | {"W": weights(COUT, CIN, kernel)}
    attributes = f'gate="g", strides={list(strides)}, pads={list(pads)}, dilations={list(dilations)}'
    expected = conv_np(arrays["X"], arrays["W"], strides=strides, pads=pads, dilations=dilations)
    tiles = upsample_np(arrays["tiles"], expected.shape[2:])
    for name in ("GatedConv", "SparseConv"):
        model, feeds = one_op(name, {"X", "W", "tiles"}, arrays, attributes=attributes)
        np.testing.assert_allclose(run(model, **feeds)["y"], expected * tiles, atol=1e-5)
        assert node_of(model, name).outputs[0].shape == list(expected.shape)


@pytest.mark.parametrize(
    "given", subsets("B", "rows", "tiles", "residual", "base"), ids=lambda s: "+".join(sorted(s)) or "none"
)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_sparse_conv(given, activation):
    arrays = values() | {"W": weights(COUT, CIN, 3)}
    model, feeds = one_op("SparseConv", {"X", "W"} | given, arrays,
                          attributes=f'gate="g", pads=[1,1,1,1], activation="{activation}"')  # fmt: skip
    y = conv_np(arrays["X"], arrays["W"], arrays["B"] if "B" in given else None, **CONV)
    y = y + arrays["residual"] if "residual" in given else y
    y = np.maximum(y, 0) if activation == "relu" else y
    part = np.ones(y.shape, bool)
    if "rows" in given:
        part &= arrays["rows"][:, :, None, None]
    if "tiles" in given:
        part &= upsample_np(arrays["tiles"], SIZE)
    expected = np.where(part, y, arrays["base"] if "base" in given else 0)
    np.testing.assert_allclose(
        run(model, **{k: v for k, v in feeds.items() if k in {"X", *given}})["y"], expected, atol=1e-5
    )


@pytest.mark.parametrize("given", [(), ("tiles",), ("action", "H"), ("action", "H", "tiles")], ids=str)
def test_merge(given):
    arrays = values()
    model, feeds = one_op("Merge", {"V", *given}, arrays, attributes='gate="g"')
    u = arrays["V"]
    if "action" in given:
        action = arrays["action"][:, :, None, None]
        u = (action == 2) * u + (action == 1) * arrays["H"]
    if "tiles" in given:
        u = u * upsample_np(arrays["tiles"], SIZE)
    np.testing.assert_array_equal(run(model, **feeds)["y"], u)
    assert node_of(model, "Merge").outputs[0].shape == [N, COUT, *SIZE]


def test_merge_leaves_exact_zeros():
    """What is skipped is zero, not nearly: a later pass drops it from reductions (`active_in`)."""
    arrays = values()
    arrays["V"] *= 1e30
    arrays["action"][:] = 0
    model, feeds = one_op("Merge", {"V", "H", "action", "tiles"}, arrays, attributes='gate="g"')
    assert not run(model, **feeds)["y"].any()


@pytest.mark.parametrize("frames", [1, 4])
def test_delay(frames):
    x, init = data(frames, 2, 3, 5), data(1, 2, 3, 5, seed=1)
    model, feeds = one_op("Delay", {"X", "init"}, {"X": x, "init": init}, attributes='name="d"')
    np.testing.assert_array_equal(run(model, **feeds)["y"], np.concatenate([init, x[:-1]]))
    assert node_of(model, "Delay").outputs[0].shape == list(x.shape)


@pytest.mark.parametrize("frames", [1, 5])
def test_frame_mean(frames):
    x = data(frames, 7)
    model, feeds = one_op("FrameMean", {"X"}, {"X": x}, attributes='name="m"')
    expected = np.stack([x[: n + 1].mean(axis=0) for n in range(frames)])
    np.testing.assert_allclose(run(model, **feeds)["y"], expected, atol=1e-6)


@pytest.mark.parametrize("frames", [1, 3])
def test_rows(frames):
    x = data(frames, 5, 4, 6)
    model, feeds = one_op("ToRows", {"X"}, {"X": x})
    rows = np.concatenate([x.transpose(0, 2, 3, 1).reshape(-1, 5), np.zeros((1, 5))])
    np.testing.assert_array_equal(run(model, **feeds)["y"], rows)
    assert node_of(model, "ToRows").outputs[0].shape == list(rows.shape)
    rows[-1] = 7  # what the zero row holds reaches no plane
    model, feeds = one_op("FromRows", {"R"}, {"R": rows.astype(np.float32)}, attributes="size=[4,6]")
    np.testing.assert_array_equal(run(model, **feeds)["y"], x)
    assert node_of(model, "FromRows").outputs[0].shape == list(x.shape)


def conv_node(op_type="GatedConv", **changes):
    arrays = {"x": ir.Value(name="x", shape=ir.Shape(["frames", 4, 8, 8]), type=ir.TensorType(ir.DataType.FLOAT))}
    weight = ir.Value(name="w", shape=ir.Shape([6, 4, 3, 3]), const_value=ir.tensor(weights(6, 4, 3)))
    inputs = changes.pop("inputs", [arrays["x"], weight])
    attributes = {"gate": "g", **changes}
    attributes = ir.convenience.convert_attributes({k: v for k, v in attributes.items() if v is not None})
    return ir.Node("dv", op_type, inputs, attributes)


def value(name, *shape, dtype=ir.DataType.BOOL):
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def problems(node):
    operator = operator_of(node)
    assert operator is not None
    return operator.problems(node)


@pytest.mark.parametrize("op_type", ["GatedConv", "SparseConv"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation": "gelu"}, "activation 'gelu', not one of none, relu"),
        ({"group": 2}, "is grouped"),
        ({"gate": None}, "lacks attribute gate"),
        ({"colour": 1}, "unknown attribute colour"),
        ({"auto_pad": "SAME_UPPER"}, "unknown attribute auto_pad"),
        ({"strides": [0, 1]}, "has strides (0, 1), which must be 2 numbers of at least 1"),
        ({"strides": [2]}, "has strides (2,)"),
        ({"pads": [1, 1]}, "has pads (1, 1), which must be 4 numbers of at least 0"),
        ({"dilations": [1, -1]}, "has dilations (1, -1)"),
        ({"dilations": 2}, "has dilations 2"),
        ({"dilations": [1, 4]}, "has a window that does not fit a plane of [8, 8]"),
        ({"gate": "a=b"}, "has gate 'a=b' is no name"),
    ],
)
def test_conv_attribute_problems(op_type, changes, said):
    assert problems(conv_node(op_type)) == []
    (found,) = problems(conv_node(op_type, **changes))
    assert said in found


def test_conv_input_problems():
    x, w = conv_node().inputs
    assert problems(conv_node(inputs=[x])) == ["lacks input W"]
    assert problems(conv_node(inputs=[x, value("w", 6, 4, 3, 3)])) == ["has a weight that is not constant"]
    open_grid = value("tiles", "frames", "rows", 4)
    assert problems(conv_node(inputs=[x, w, None, None, open_grid])) == ["has a tile mask whose grid is not static"]
    history = value("h", 1, 6, 6, 6, dtype=ir.DataType.FLOAT)
    assert problems(conv_node(inputs=[x, w, *[None] * 4, history])) == ["has a history but no action"]
    assert "at most 7 are defined" in problems(conv_node(inputs=[x, w, *[None] * 5, history]))[0]


@pytest.mark.parametrize(
    ("position", "given", "said"),
    [
        (0, ("x", "frames", 3, 8, 8), "has X [frames,3,8,8] and W [6,4,3,3]"),
        (0, ("x", "frames", 4, 8), "not [N, Cin, H, W]"),
        (0, ("x", "frames", 4, "rows", 8), "has a plane that is not static"),
        (3, ("a", "frames", 5), "has action of shape [frames,5], not [frames, 6]"),
        (3, ("a", "frames", 6, 3), "has action of shape [frames,6,3]"),
        (4, ("t", "frames", 1, 4, 4), "has tiles of shape [frames,1,4,4], not [frames, any, any]"),
        (5, ("i", "frames", 6), "has active_in of shape [frames,6], not [frames, 4]"),
        (3, ("a", "frames", 6, ir.DataType.FLOAT), "has action of type FLOAT, not INT64"),
        (4, ("t", "frames", 4, 4, ir.DataType.FLOAT), "has tiles of type FLOAT, not BOOL"),
        (0, ("x", "frames", 4, 8, 8, ir.DataType.DOUBLE), "has X of type DOUBLE, not FLOAT"),
    ],
)
def test_conv_shape_problems(position, given, said):
    name, *sizes = given
    types = {0: ir.DataType.FLOAT, 3: ir.DataType.INT64}
    dtype = sizes.pop() if isinstance(sizes[-1], ir.DataType) else types.get(position, ir.DataType.BOOL)
    inputs = [*conv_node().inputs, *[None] * 4]
    inputs[position] = value(name, *sizes, dtype=dtype)
    found = problems(conv_node(inputs=inputs))
    assert len(found) == 1 and said in found[0]


def test_merge_problems():
    v, action = value("v", 1, 6, 8, 8, dtype=ir.DataType.FLOAT), value("a", 1, 6, dtype=ir.DataType.INT64)
    node = ir.Node("dv", "Merge", [v, None, action], ir.convenience.convert_attributes({"gate": "g"}))
    assert problems(node) == ["has an action but no history"]


@pytest.mark.parametrize("name", ["Delay", "FrameMean"])
def test_states_need_names(name):
    inputs = [value("x", "frames", 3)] * len(OPERATORS[name].inputs)
    assert problems(ir.Node("dv", name, inputs)) == ["lacks attribute name"]


def test_frame_mean_takes_rows():
    node = ir.Node("dv", "FrameMean", [value("x", "frames", 3, 4)], ir.convenience.convert_attributes({"name": "m"}))
    assert problems(node) == ["needs X [N, K], not [frames,3,4]"]


def overload(model):
    """The digest a model's only dialect node was given."""
    (node,) = attach_references(model).graph
    return node.overload


def test_overloads_tell_specialised_texts_apart():
    arrays = values() | {"W": weights(COUT, CIN, 3)}

    def digest(given=("X", "W", "tiles"), attributes='gate="g", pads=[1,1,1,1]', **changes):
        return overload(one_op("SparseConv", set(given), arrays | changes, attributes=attributes)[0])

    same = digest()
    assert digest() == same
    others = [
        digest(given=("X", "W", "tiles", "B")),
        digest(given=("X", "W", "rows")),
        digest(tiles=np.ones((N, 2, 2), bool)),
        digest(X=data(N, CIN, 8, 8)),
        digest(attributes='gate="g", pads=[1,1,1,1], strides=[2,2]'),
    ]
    assert len({same, *others}) == 1 + len(others)


def test_two_shapes_in_one_model_run():
    """Functions are made once a shape: the two must not be confused."""
    model = graph(
        """g (float[2,3,8,8] x, float[4,3,3,3] W, bool[2,4,4] fine, bool[2,2,2] coarse)
        => (float[2,4,8,8] a, float[2,4,8,8] b) {
            a = dv.GatedConv<pads=[1,1,1,1], gate="a">(x, W, , , fine)
            b = dv.GatedConv<pads=[1,1,1,1], gate="b">(x, W, , , coarse)
        }""",
        W=weights(4, 3, 3),
    )
    x, fine, coarse = data(2, 3, 8, 8), np.random.default_rng(0).random((2, 4, 4)) < 0.5, np.array([np.eye(2) > 0] * 2)
    found, v = run(model, x=x, fine=fine, coarse=coarse), conv_np(x, weights(4, 3, 3), **CONV)
    np.testing.assert_allclose(found["a"], v * upsample_np(fine, (8, 8)), atol=1e-5)
    np.testing.assert_allclose(found["b"], v * upsample_np(coarse, (8, 8)), atol=1e-5)


@pytest.mark.parametrize(("size", "grid"), [(7, 3), (8, 4), (11, 4), (5, 5), (3, 5)])
def test_tile_index(size, grid):
    assert tile_index(size, grid).tolist() == [y * grid // size for y in range(size)]


@pytest.mark.parametrize(("batch", "tokens", "keep"), [(1, 9, 4), (1, 5, 5), (3, 8, 1), (2, 8, 7)])
def test_select_tokens(batch, tokens, keep):
    """Few values, so that ties are many: of equal scores the lower index comes first."""
    rng = np.random.default_rng(tokens)
    x, score = data(batch, tokens, 6), rng.integers(0, 3, (batch, tokens)).astype(np.float32)
    model = graph(
        f"""g (float[{batch},{tokens},6] x, float[{batch},{tokens}] score) => (float[b,k,c] kept, int64[b,k] index) {{
            kept, index = dv.SelectTokens<keep={keep}, gate="sta.0.0">(x, score)
        }}"""
    )
    node = node_of(model, "SelectTokens")
    for output in node.outputs:
        output.shape = None
    OPERATORS["SelectTokens"].infer(node)
    found = run(model, x=x, score=score)
    expected = np.array([sorted(range(tokens), key=lambda i, row=row: (row[i], i))[:keep] for row in score])
    np.testing.assert_array_equal(found["index"], expected)
    np.testing.assert_array_equal(found["kept"], np.stack([x[b, expected[b]] for b in range(batch)]))
    assert [output.shape for output in node.outputs] == [[batch, keep, 6], [batch, keep]]
    assert problems(node) == []


@pytest.mark.parametrize(
    ("x", "score", "attributes", "said"),
    [
        ((1, 4, 8), (1, 4), {"keep": 5, "gate": "g"}, "keeps 5 of 4 tokens"),
        ((1, 4, 8), (1, 4), {"keep": 0, "gate": "g"}, "keeps 0 of 4 tokens"),
        ((1, 4, 8), (1, 3), {"keep": 2, "gate": "g"}, "needs tokens [B, N, C] and scores [B, N]"),
        ((4, 8), (4, 8), {"keep": 2, "gate": "g"}, "needs tokens [B, N, C] and scores [B, N]"),
        ((1, "n", 8), (1, "n"), {"keep": 2, "gate": "g"}, "needs a fixed number of tokens"),
        ((1, 4, 8), (1, 4), {"gate": "g"}, "lacks attribute keep"),
        ((1, 4, 8), (1, 4), {"keep": 2}, "lacks attribute gate"),
    ],
)
def test_select_tokens_problems(x, score, attributes, said):
    inputs = [value(name, *shape, dtype=ir.DataType.FLOAT) for name, shape in (("x", x), ("score", score))]
    (found,) = problems(ir.Node("dv", "SelectTokens", inputs, ir.convenience.convert_attributes(attributes)))
    assert said in found
