"""Weights apart from graphs: found again, in panels too, and refused where a file is not what a graph says."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dvexport.errors import BundleError
from dvexport.graph.weights import (
    WEIGHTS,
    Place,
    WeightFile,
    attach_weights,
    digest,
    external_arrays,
    panels_of,
    pitch_of,
    split_weights,
)

NATIVE_WEIGHTS = f"native/{WEIGHTS}"
RNG = np.random.default_rng(1)
FACTOR = RNG.standard_normal((20, 30)).astype(np.float32)
KERNEL = RNG.standard_normal((24, 3, 2, 4)).astype(np.float32)


def packed(matrix, panel):
    """`[K, N]` as `[panels, K, panel]`, by the definition."""
    panels = -(-matrix.shape[1] // panel)
    made = np.zeros((panels, len(matrix), panel), np.float32)
    for column in range(matrix.shape[1]):
        made[column // panel, :, column % panel] = matrix[:, column]
    return made


def graph(**arrays):
    """A model that hands out its weights."""
    values = [
        ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
        for name, array in arrays.items()
    ]
    for value, array in zip(values, arrays.values(), strict=True):
        value.dtype = ir.DataType.from_numpy(array.dtype)
    nodes = [ir.Node("", "Identity", [value]) for value in values]
    made = ir.Graph([], [node.outputs[0] for node in nodes], nodes=nodes, initializers=values, opset_imports={"": 20})
    return ir.Model(made, ir_version=10)


def content(file):
    return np.frombuffer(b"".join(bytes(chunk) for chunk in file.chunks()), np.uint8)


def stored(**arrays):
    """A graph's text, its file, and the weights by name."""
    file = WeightFile()
    text, _ = split_weights(graph(**arrays), file.refer)
    return text, content(file)


@pytest.mark.parametrize("panel", [1, 8, 16, 48])
def test_weights_are_read_out_of_panels(panel):
    """A factor `[K, N]`, and a kernel whose product has its transpose: no byte of them is stored again."""
    other, lies = RNG.standard_normal(400).astype(np.float32), KERNEL.reshape(24, -1).T
    pieces = [packed(FACTOR, panel), packed(lies, panel)]
    native = np.frombuffer(b"".join(bytes(64) + piece.tobytes() for piece in pieces), np.uint8)
    assert [panels_of(FACTOR, pieces[0]), panels_of(lies, pieces[1])] == [panel, panel]
    second = 128 + pieces[0].nbytes
    held = {
        digest(FACTOR): Place(NATIVE_WEIGHTS, 64, pieces[0].nbytes, panel),
        digest(KERNEL): Place(NATIVE_WEIGHTS, second, pieces[1].nbytes, panel, turned=True),
    }
    file = WeightFile(held=held)
    model = graph(factor=FACTOR, kernel=KERNEL, other=other)
    text, _ = split_weights(model, file.refer)
    assert file.size == other.nbytes
    files = {WEIGHTS: content(file), NATIVE_WEIGHTS: native}
    read = attach_weights(text, files.__getitem__, where="x")
    for name, array in {"factor": FACTOR, "kernel": KERNEL, "other": other}.items():
        tensor = read.graph.initializers[name].const_value
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert model.graph.initializers[name].const_value.numpy() is not None  # the model keeps its own


def test_what_is_packed_otherwise_is_no_panel():
    pieces = packed(FACTOR, 8)
    assert panels_of(FACTOR, pieces) == 8
    assert panels_of(FACTOR, pieces + 1) == 0
    assert panels_of(FACTOR, np.concatenate([pieces, pieces])) == 0
    assert panels_of(FACTOR, pieces.astype(np.float16)) == 0
    assert panels_of(FACTOR[:-1], pieces) == 0


def test_weights_are_read_out_of_rows_with_gaps():
    rows = np.zeros((len(KERNEL), KERNEL[0].size + 8), np.float32)
    rows[:, : KERNEL[0].size] = KERNEL.reshape(len(KERNEL), -1)
    assert pitch_of(KERNEL, rows) == rows.shape[1]
    assert pitch_of(KERNEL, rows + 1) == pitch_of(KERNEL, rows[:-1]) == pitch_of(KERNEL, rows.ravel()) == 0
    file = WeightFile(held={digest(KERNEL): Place(NATIVE_WEIGHTS, 0, rows.nbytes, pitch=rows.shape[1])})
    text, _ = split_weights(graph(kernel=KERNEL), file.refer)
    arrays = external_arrays(text, lambda _: rows.ravel().view(np.uint8), where="x")
    assert file.size == 0
    np.testing.assert_array_equal(arrays["kernel"], KERNEL)


def test_a_convolution_s_weight_is_found_by_tap():
    """As the lowering by tiles lays it out; what any reader of ONNX opens refers to nothing of that kind."""
    file, matrix = WeightFile(), KERNEL.transpose(2, 3, 1, 0).reshape(-1, len(KERNEL))
    split_weights(graph(matrix=matrix), file.add)
    text, _ = split_weights(graph(kernel=KERNEL), file.refer)
    assert file.size == KERNEL.nbytes
    np.testing.assert_array_equal(external_arrays(text, lambda _: content(file), where="x")["kernel"], KERNEL)
    plain, _ = split_weights(graph(kernel=KERNEL), file.add)
    assert {entry.key for entry in plain.graph.initializer[0].external_data} == {"location", "offset", "length"}


def test_equal_arrays_are_stored_once():
    text, file = stored(a=FACTOR, b=FACTOR.copy(), c=FACTOR.reshape(30, 20))
    assert file.size == FACTOR.nbytes
    arrays = external_arrays(text, lambda _: file, where="x")
    np.testing.assert_array_equal(arrays["b"], FACTOR)
    assert arrays["c"].shape == (30, 20)


def entry(text, key, value):
    """Change what the first weight says of its place."""
    (found,) = [each for each in text.graph.initializer[0].external_data if each.key == key] or [
        text.graph.initializer[0].external_data.add(key=key)
    ]
    found.value = value


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("location", "../weights.bin", "it is in a file '../weights.bin'"),
        ("location", "golden.safetensors", "it is in a file 'golden.safetensors'"),
        ("offset", "4", "bytes 4 to 2404 of 2400"),
        ("offset", "-4", "bytes -4"),
        ("offset", "2", "bytes 2"),
        ("offset", "999999999999999999999", "of 2400"),
        ("offset", "all", "invalid literal"),
        ("length", "2396", "2396 bytes are no float32 of shape [20, 30]"),
        ("length", "-1", "-1 bytes"),
        ("length", "", "invalid literal"),
        ("dvexport.panel", "16", "dvexport.panel 16"),
        ("dvexport.panel", "-1", "dvexport.panel -1"),
        ("dvexport.panel", "wide", "invalid literal"),
        ("dvexport.pitch", "29", "float32 of shape [20, 30], dvexport.pitch 29"),
        ("dvexport.pitch", "-30", "dvexport.pitch -30"),
        ("dvexport.pitch", "1" + "0" * 30, "dvexport.pitch 1000"),
        ("dvexport.order", "0,0", "dvexport.order 0,0"),
        ("dvexport.order", "1,0,2", "dvexport.order 1,0,2"),
        ("dvexport.order", "1;0", "invalid literal"),
    ],
)
def test_a_place_that_is_not_there(key, value, why):
    text, file = stored(factor=FACTOR)
    entry(text, key, value)
    with pytest.raises(BundleError, match="a weight can't be read") as error:
        external_arrays(text, lambda _: file, where="x")
    assert why in error.value.why
    assert error.value.where == "x, factor"


def test_a_truncated_file():
    text, file = stored(factor=FACTOR)
    with pytest.raises(BundleError, match="a weight can't be read") as error:
        attach_weights(text, lambda _: file[:-4], where="x")
    assert error.value.why == "bytes 0 to 2400 of 2396"


def test_an_empty_weight_of_sizes_above_all_bounds():
    text, file = stored(factor=FACTOR)
    text.graph.initializer[0].dims[:] = [0, 1 << 62, 1 << 62]
    entry(text, "length", "0")
    with pytest.raises(BundleError, match="a weight can't be read"):
        external_arrays(text, lambda _: file, where="x")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.ClearField("dims"), "2400 bytes are no float32 of shape []"),
        (lambda t: t.dims.append(2), "2400 bytes are no float32 of shape [20, 30, 2]"),
        (lambda t: t.dims.__setitem__(0, -20), "2400 bytes are no float32"),
        (lambda t: setattr(t, "data_type", onnx.TensorProto.STRING), "2400 bytes are no object"),
        (lambda t: setattr(t, "data_type", onnx.TensorProto.DOUBLE), "2400 bytes are no float64"),
        (lambda t: setattr(t, "data_type", 99), "99"),
    ],
)
def test_a_weight_of_another_form(change, why):
    text, file = stored(factor=FACTOR)
    change(text.graph.initializer[0])
    with pytest.raises(BundleError, match="a weight can't be read") as error:
        external_arrays(text, lambda _: file, where="x")
    assert why in error.value.why
