"""Kernels made through Relax, against ONNX Runtime."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from native_harness import Callable, aligned, host_machine
from onnx import parser
from onnx_ir.passes.common import ShapeInferencePass

from dvexport.errors import UsageError
from dvexport.targets.tvm.build.compile import compile_kernel
from dvexport.targets.tvm.islands.island import Island, compile_island
from dvexport.targets.tvm.machine.machine import Machine

HEADER = '<ir_version: 10, opset_import: ["": 20]>\n'
SCOPES = "pkg.torch.onnx.name_scopes"


def proxy(lanes: int) -> Machine:
    """A machine of fewer lanes that this host can run."""
    host = host_machine()
    return Machine(host.triple, host.mcpu, host.features, lanes, host.block)


def model_of(text: str) -> onnx.ModelProto:
    return parser.parse_model(HEADER + text)


def island_of(proto: onnx.ModelProto, machine: Machine) -> tuple[Island, ir.Graph]:
    graph = ShapeInferencePass()(ir.from_proto(proto)).model.graph
    return compile_island(list(graph), list(graph.inputs), list(graph.outputs), machine), graph


def random_feeds(graph: ir.Graph, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in graph.inputs:
        shape, dtype = [int(size) for size in value.shape], value.dtype.numpy()
        drawn = (
            rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2 if dtype.kind == "b" else 3, shape)
        )
        feeds[value.name] = np.asarray(drawn).astype(dtype)
    return feeds


_loaded: dict[tuple[str, Machine], Callable] = {}


def run(island: Island, feeds: dict, wanted: dict, machine: Machine, threads: int) -> dict[str, np.ndarray]:
    """Call an island's kernels; every array has guards around it."""
    memory = {name: guarded(array) for name, array in (feeds | island.constants).items()}
    for name, (dtype, shape) in island.buffers.items():
        memory[name] = guarded(np.full(shape, 7, np.dtype(dtype)))
    for name, array in wanted.items():
        if name not in island.aliases:
            memory[name] = guarded(np.full(array.shape, 1, array.dtype))
    for kernel, arguments in island.calls:
        key = (kernel.name, machine)
        if key not in _loaded:
            _loaded[key] = Callable(kernel, machine)
        _loaded[key](*(memory[name] for name in arguments), threads=threads if kernel.splits else 1)
    for name, array in memory.items():
        assert_guards(name, array)
    for name, array in (feeds | island.constants).items():
        np.testing.assert_array_equal(memory[name], array)
    for output, source in island.aliases.items():
        memory[output] = memory[source].reshape(wanted[output].shape)
    return {name: memory[name] for name in wanted}


def guarded(array: np.ndarray) -> np.ndarray:
    return aligned(np.asarray(array), spare=16)


def assert_guards(name: str, array: np.ndarray) -> None:
    memory = array
    while memory.base is not None:
        memory = memory.base
    start = array.ctypes.data - memory.ctypes.data
    assert (memory[:start] == 0xAA).all(), name
    assert (memory[start + array.nbytes :] == 0xAA).all(), name


def check(text: str, machine: Machine | None = None, threads: int = 1, feeds: dict | None = None) -> Island:
    """Compile all nodes of a model as one island and compare every output."""
    machine, proto = machine or host_machine(), model_of(text)
    island, graph = island_of(proto, machine)
    feeds = random_feeds(graph) | (feeds or {})
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in graph.outputs]
    wanted = dict(zip(names, session.run(names, feeds), strict=True))
    got = run(island, feeds, wanted, machine, threads)
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype
        if array.dtype.kind == "f":
            np.testing.assert_allclose(got[name], array, rtol=2e-6, atol=2e-6 * np.abs(array).max(initial=0))
        else:
            np.testing.assert_array_equal(got[name], array)
    return island


def numbers(*shape: int, seed: int = 0) -> tuple[str, str]:
    """Type and values of an initializer."""
    drawn = np.random.default_rng(seed).standard_normal(math.prod(shape))
    return f"float[{','.join(map(str, shape))}]", ",".join(f"{value:.4f}" for value in drawn)


def initializer(name: str, *shape: int) -> str:
    kind, values = numbers(*shape)
    return f"{kind} {name} = {{{values}}}"


ELEMENTWISE = {
    "equal": "g (int64[1,40] x, int64[1,40] z) => (bool[1,40] y) { y = Equal(x, z) }",
    "not": "g (bool[1,33] x) => (bool[1,33] y) { y = Not(x) }",
    "and": "g (bool[2,5,7] x, bool[2,1,1] z) => (bool[2,5,7] y) { y = And(x, z) }",
    "or": "g (bool[5] x, bool[5] z) => (bool[5] y) { y = Or(x, z) }",
    "greater": "g (float[3,7] x, float[7] z) => (bool[3,7] y) { y = Greater(x, z) }",
    "greater_or_equal": "g (float[49] x) => (bool[49] y) <float z = {0.25}> { y = GreaterOrEqual(x, z) }",
    "cast_bool": "g (bool[21] x) => (float[21] y) { y = Cast<to = 1>(x) }",
    "cast_to_bool": "g (float[21] x) => (bool[21] y) { y = Cast<to = 9>(x) }",
    "cast_int64": "g (float[21] x) => (int64[21] y) { y = Cast<to = 7>(x) }",
    "add": "g (float[2,3,5] x, float[3,1] z) => (float[2,3,5] y) { y = Add(x, z) }",
    "sub": "g (float[64] x, float[64] z) => (float[64] y) { y = Sub(x, z) }",
    "mul": "g (float[1,6,7,7] x, float[1,1,7,7] z) => (float[1,6,7,7] y) { y = Mul(x, z) }",
    "div": "g (float[3] x, float[3] z) => (float[3] y) { y = Div(x, z) }",
    "scalar": "g (float x, float z) => (float y) { y = Add(x, z) }",
    "relu": "g (float[70] x) => (float[70] y) { y = Relu(x) }",
    "clip": "g (float[70] x) => (float[70] y) <float lo = {0.0}, float hi = {1.0}> { y = Clip(x, lo, hi) }",
    "where": "g (bool[9] c, float[9] x, float[9] z) => (float[9] y) { y = Where(c, x, z) }",
    "exp": "g (float[50] x) => (float[50] y) { y = Exp(x) }",
    "sigmoid": "g (float[50] x) => (float[50] y) { y = Sigmoid(x) }",
    "tanh": "g (float[50] x) => (float[50] y) { y = Tanh(x) }",
    "gelu": "g (float[50] x) => (float[50] y) { y = Gelu(x) }",
    "sqrt": "g (float[50] x) => (float[50] y) { a = Abs(x) y = Sqrt(a) }",
    "log": "g (float[50] x) => (float[50] y) { a = Abs(x) y = Log(a) }",
}

MOVES = {
    "reshape": "g (float[1,96] x) => (float[1,32,3] y) <int64[3] s = {1,32,3}> { z = Relu(x) y = Reshape(z, s) }",
    "transpose": "g (float[2,5,6,7] x) => (float[2,6,7,5] y) { y = Transpose<perm = [0,2,3,1]>(x) }",
    "concat": "g (float[1,4,6,6] x, float[1,3,6,6] z) => (float[1,7,6,6] y) { y = Concat<axis = 1>(x, z) }",
    "concat_last": "g (float[3,5] x, float[3,17] z) => (float[3,22] y) { y = Concat<axis = 1>(x, z) }",
    "slice": """g (float[1,9,6,6] x) => (float[1,4,6,6] y) <int64[1] a = {2}, int64[1] e = {6}, int64[1] k = {1}>
        { y = Slice(x, a, e, k) }""",
    "slice_step": """g (float[40] x) => (float[13] y) <int64[1] a = {1}, int64[1] e = {40}, int64[1] k = {0},
        int64[1] s = {3}> { y = Slice(x, a, e, k, s) }""",
    "gather": "g (float[5,9] x) => (float[5,4] y) <int64[4] i = {8,0,3,3}> { y = Gather<axis = 1>(x, i) }",
    "gather_rows": "g (float[5,9] x, int64[3] i) => (float[3,9] y) { y = Gather<axis = 0>(x, i) }",
    "unsqueeze": "g (bool[1,7,7] x) => (bool[1,1,7,7] y) <int64[1] a = {1}> { z = Not(x) y = Unsqueeze(z, a) }",
    "pad": "g (float[2,5,5] x) => (float[2,8,6] y) <int64[6] p = {0,1,0,0,2,1}> { y = Pad(x, p) }",
    "expand": "g (float[3,1] x) => (float[2,3,5] y) <int64[3] s = {2,3,5}> { y = Expand(x, s) }",
    "split": """g (float[4,10] x) => (float[4,3] y, float[4,7] z) <int64[2] s = {3,7}>
        { y, z = Split<axis = 1>(x, s) }""",
}

REDUCTIONS = {
    "argmax": "g (float[1,256,3] x) => (int64[1,256] y) { y = ArgMax<axis = 2, keepdims = 0>(x) }",
    "argmax_channels": "g (float[2,6,5,5] x) => (int64[2,1,5,5] y) { y = ArgMax<axis = 1>(x) }",
    "mean_plane": """g (float[1,37,7,7] x) => (float[1,37] y) <int64[2] a = {2,3}>
        { y = ReduceMean<keepdims = 0>(x, a) }""",
    "mean_channels": "g (float[1,37,7,7] x) => (float[1,1,7,7] y) <int64[1] a = {1}> { y = ReduceMean(x, a) }",
    "mean_all": "g (float[300] x) => (float[1] y) { y = ReduceMean(x) }",
    "max": "g (float[8,33] x) => (float[8,1] y) <int64[1] a = {1}> { y = ReduceMax(x, a) }",
    "min": "g (float[8,33] x) => (float[33] y) <int64[1] a = {0}> { y = ReduceMin<keepdims = 0>(x, a) }",
    "prod": "g (float[8,21] x) => (float[8] y) <int64[1] a = {1}> { y = ReduceProd<keepdims = 0>(x, a) }",
    "softmax": "g (float[8,19] x) => (float[8,19] y) { y = Softmax(x) }",
    "softmax_channels": "g (float[1,5,9] x) => (float[1,5,9] y) { y = Softmax<axis = 1>(x) }",
    "layer_norm": f"""g (float[8,48] x) => (float[8,48] y) <{initializer("s", 48)}, {initializer("b", 48)}>
        {{ y = LayerNormalization(x, s, b) }}""",
    "topk": "g (float[3,50] x) => (float[3,4] y, int64[3,4] i) <int64[1] k = {4}> { y, i = TopK(x, k) }",
    "bottom_k": """g (float[50] x) => (float[7] y, int64[7] i) <int64[1] k = {7}>
        { y, i = TopK<largest = 0>(x, k) }""",
    "matmul": f"g (float[3,40] x) => (float[3,17] y) <{initializer('w', 40, 17)}> {{ y = MatMul(x, w) }}",
    "gemm": f"""g (float[1,40] x) => (float[1,21] y) <{initializer("w", 21, 40)}, {initializer("b", 21)}>
        {{ z = Gemm<transB = 1>(x, w, b) y = Relu(z) }}""",
    "batch_norm": f"""g (float[2,6,5,5] x) => (float[2,6,5,5] y) <{initializer("s", 6)}, {initializer("b", 6)},
        {initializer("m", 6)}, float[6] v = {{1, 2, 3, 4, 5, 6}}> {{ y = BatchNormalization(x, s, b, m, v) }}""",
}

WINDOWS = {
    "conv_mask": f"""g (float[1,40,7,7] x) => (float[1,1,7,7] y) <{initializer("w", 1, 40, 3, 3)}, float[1] b = {{0.5}}>
        {{ y = Conv<pads = [1,1,1,1]>(x, w, b) }}""",
    "conv_1x1": f"g (float[2,9,5,5] x) => (float[2,4,5,5] y) <{initializer('w', 4, 9, 1, 1)}> {{ y = Conv(x, w) }}",
    "conv_groups": f"""g (float[1,8,9,9] x) => (float[1,12,9,9] y) <{initializer("w", 12, 2, 3, 3)}>
        {{ y = Conv<group = 4, pads = [1,1,1,1]>(x, w) }}""",
    "depthwise": f"""g (float[1,24,28,28] x) => (float[1,24,28,28] y)
        <{initializer("w", 24, 1, 3, 3)}, float lo = {{0.0}}, float hi = {{6.0}}>
        {{ z = Conv<group = 24, pads = [1,1,1,1]>(x, w) y = Clip(z, lo, hi) }}""",
    "depthwise_stride": f"""g (float[1,20,28,28] x) => (float[1,20,14,14] y) <{initializer("w", 20, 1, 3, 3)}>
        {{ y = Conv<group = 20, pads = [1,1,1,1], strides = [2,2]>(x, w) }}""",
    "conv_dilated": f"""g (float[1,3,13,17] x) => (float[1,5,9,13] y) <{initializer("w", 5, 3, 3, 3)}>
        {{ y = Conv<dilations = [2,2]>(x, w) }}""",
    "max_pool": """g (float[1,7,30,30] x) => (float[1,7,15,15] y)
        { y = MaxPool<kernel_shape = [3,3], pads = [1,1,1,1], strides = [2,2]>(x) }""",
    "average_pool": """g (float[1,7,30,30] x) => (float[1,7,6,6] y)
        { y = AveragePool<kernel_shape = [5,5], strides = [5,5]>(x) }""",
    "average_pool_padded": """g (float[1,3,9,9] x) => (float[1,3,9,9] y)
        { y = AveragePool<kernel_shape = [3,3], pads = [1,1,1,1]>(x) }""",
    "global_pool": "g (float[1,33,7,7] x) => (float[1,33,1,1] y) { y = GlobalAveragePool(x) }",
    "resize": """g (float[1,3,7,7] x) => (float[1,3,14,14] y) <float[4] s = {1, 1, 2, 2}>
        { y = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric",
                     nearest_mode = "floor">(x, , s) }""",
}

POLICY = f"""g (float[1,40,7,7] x, float[1,40] before, bool[1,16] stale, float[1,48] scores)
    => (bool[1,7,7] tiles, float[1,80] seen, int64[1,16] action, bool[1,16] again, bool[1,16] computed, bool[1,16] kept)
    <{initializer("w", 1, 40, 3, 3)}, float[1] b = {{0.1}}, float zero = {{0.0}}, int64[1] one = {{1}},
     int64[2] plane = {{2, 3}}, int64[3] shape = {{1, 16, 3}}, int64 two = {{2}}, int64 reuse = {{1}}>
    {{ c = Conv<pads = [1,1,1,1]>(x, w, b)
       flat = Squeeze(c, one)
       tiles = GreaterOrEqual(flat, zero)
       mask = Cast<to = 1>(tiles)
       wide = Unsqueeze(mask, one)
       masked = Mul(x, wide)
       mean = ReduceMean<keepdims = 0>(masked, plane)
       seen = Concat<axis = 1>(before, mean)
       each = Reshape(scores, shape)
       action = ArgMax<axis = 2, keepdims = 0>(each)
       computed = Equal(action, two)
       reused = Equal(action, reuse)
       again = And(reused, stale)
       kept = Not(computed) }}"""

ALL = ELEMENTWISE | MOVES | REDUCTIONS | WINDOWS


@pytest.mark.parametrize("name", ALL)
def test_an_operator_is_computed_as_onnx_says(name):
    check(ALL[name])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_a_policy_is_right_on_any_machine_with_any_number_of_threads(lanes, threads):
    check(POLICY, proxy(lanes), threads)


@pytest.mark.parametrize("lanes", [4, 8])
@pytest.mark.parametrize("name", ["depthwise", "mean_plane", "argmax", "gemm", "softmax", "max_pool"])
def test_narrow_vectors(name, lanes):
    check(ALL[name], proxy(lanes))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("name", ["depthwise", "depthwise_stride", "conv_mask"])
def test_large_stages_are_shared_between_threads(name, threads):
    assert any(kernel.splits for kernel, _ in check(ALL[name], threads=threads).calls)


def test_a_policy_is_few_calls():
    assert len(check(POLICY).calls) <= 3


def test_limits_that_are_constants_take_no_call_of_their_own():
    island = check(ELEMENTWISE["clip"])
    assert len(island.calls) == 1
    assert not island.buffers
    assert not island.constants


def test_what_reads_a_decision_point_by_point_needs_no_buffer():
    island = check("""g (float[1,16,3] x) => (int64[1,16] y, bool[1,16] z) <int64 two = {2}>
        { y = ArgMax<axis = 2, keepdims = 0>(x) z = Equal(y, two) }""")
    assert not island.buffers


def test_a_reshaped_input_is_an_alias():
    island = check("g (float[2,6] x) => (float[3,4] y) <int64[2] s = {3,4}> { y = Reshape(x, s) }")
    assert island.aliases == {"y": "x"}
    assert not island.calls


def test_two_names_of_one_value_are_two_outputs():
    check("""g (float[2,6] x) => (float[2,6] y, float[12] z) <int64[1] s = {12}>
        { y = Relu(x) z = Reshape(y, s) }""")


def test_a_constant_output_is_copied():
    check("g (float[3] x) => (float[3] y, float[2] z) <float[2] c = {1, 2}> { y = Relu(x) z = Identity(c) }")


def test_equal_islands_share_their_kernels():
    text = "g (float[1,40] x) => (float[1,40] y) <float w = {{2}}, float b = {{{}}}> {{ m = Mul(x, w) y = Add(m, b) }}"
    names = [[kernel.name for kernel, _ in check(text.format(bias)).calls] for bias in (1, 1, 3)]
    assert names[0] == names[1] != names[2]


def test_islands_that_differ_in_weights_share_their_kernels():
    def text(seed: int) -> str:
        kind, values = numbers(21, 40, seed=seed)
        return f"g (float[1,40] x) => (float[1,21] y) <{kind} w = {{{values}}}> {{ y = Gemm<transB = 1>(x, w) }}"

    first, second = check(text(0)), check(text(1))
    assert [kernel.name for kernel, _ in first.calls] == [kernel.name for kernel, _ in second.calls]
    (one,), (other,) = first.constants.values(), second.constants.values()
    assert not np.array_equal(one, other)


def test_names_of_kernels_repeat():
    command = [
        sys.executable,
        "-c",
        "from test_generic import *; print(island_of(model_of(POLICY), proxy(8))[0].calls[-1][0].name)",
    ]
    folders = {"PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path]), "PYTHONHASHSEED": "7"}
    name = subprocess.run(command, capture_output=True, text=True, check=True, env=folders).stdout.strip()
    assert name == island_of(model_of(POLICY), proxy(8))[0].calls[-1][0].name


@pytest.mark.parametrize("name", [name for name in ALL if name != "log"])
def test_nothing_is_needed_but_what_c_compilers_need_as_well(name, tmp_path):
    machine = host_machine()
    for kernel, _ in island_of(model_of(ALL[name]), machine)[0].calls:
        assert undefined(compile_kernel(kernel, machine), tmp_path) <= {"memcpy", "memset"}


def test_logarithms_are_the_c_librarys(tmp_path):
    machine = host_machine()
    ((kernel, _),) = island_of(model_of(ELEMENTWISE["log"]), machine)[0].calls
    assert undefined(compile_kernel(kernel, machine), tmp_path) == {"logf"}


def undefined(data: bytes, folder: Path) -> set[str]:
    """Names that an object file needs from elsewhere."""
    path = folder / "kernel.o"
    path.write_bytes(data)
    listing = subprocess.run(["nm", "-u", str(path)], capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in listing.stdout.splitlines()}


def test_exponentials_keep_their_precision_and_what_is_no_number():
    x = np.concatenate([np.linspace(-100, 100, 4000), [np.inf, -np.inf, np.nan, 0, 88.72, 89, -104]]).astype(np.float32)
    text = f"""g (float[{len(x)}] x) => (float[{len(x)}] e, float[{len(x)}] s, float[{len(x)}] t, float[{len(x)}] r)
        {{ e = Exp(x) s = Sigmoid(x) t = Tanh(x) r = Erf(x) }}"""
    island, _ = island_of(model_of(text), host_machine())
    got = run(island, {"x": x}, {name: np.empty_like(x) for name in "estr"}, host_machine(), 1)
    exact = x.astype(np.float64)
    with np.errstate(over="ignore"):
        wanted = {
            "e": np.exp(exact), "s": 1 / (1 + np.exp(-exact)), "t": np.tanh(exact), "r": np.vectorize(math.erf)(exact)
        }  # fmt: skip
        for name, array in wanted.items():
            np.testing.assert_allclose(got[name], array.astype(np.float32), rtol=4e-7, atol=2e-38, err_msg=name)


@pytest.mark.parametrize(("rows", "columns", "vectors"), [(900, 3, True), (2, 900, False)])
def test_a_transposition_is_done_in_vectors_where_its_rows_are_long(rows, columns, vectors):
    text = f"g (float[{rows},{columns}] x) => (float[{columns},{rows}] y) {{ y = Transpose<perm = [1,0]>(x) }}"
    scripts = [kernel.func.script() for kernel, _ in check(text).calls]
    assert scripts
    assert any("Ramp" in script for script in scripts) == vectors


def test_an_unknown_operator_is_named_with_its_place_in_the_model():
    x = ir.Value(name="x", shape=ir.Shape([1, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("", "Det", [x], name="node_det", metadata_props={SCOPES: "['', 'layer1', 'layer1.0', 'det']"})
    with pytest.raises(UsageError) as caught:
        compile_island([node], [x], list(node.outputs), host_machine())
    for text in ("'Det'", "node_det", "layer1.0", "--backend onnx"):
        assert text in str(caught.value)


def test_an_operator_that_needs_a_library_is_named():
    proto = model_of("""g (float[40] x) => (int64[1,N] y) { z = Relu(x) y = NonZero(z) }""")
    with pytest.raises(UsageError, match="'NonZero'"):
        island_of(proto, host_machine())


def test_an_island_that_reads_what_nothing_provides_is_refused():
    x, z = (
        ir.Value(name=name, shape=ir.Shape([4]), type=ir.TensorType(ir.DataType.FLOAT)) for name in ("x", "elsewhere")
    )
    node = ir.Node("", "Add", [x, z])
    with pytest.raises(UsageError, match="elsewhere"):
        compile_island([node], [x], list(node.outputs), host_machine())
