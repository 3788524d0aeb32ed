"""Rules of operators for a frame axis that is not in front, each held against what the operator computes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from dvexport.passes.frame_axis import frame_dims, frames_stay_apart

FRAMES = 3
CONSTANTS = """int64[2] ends = {1, 0}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2},
    int64[1] step = {-1}, int64[1] far = {-9}, int64[2,2] pairs = {0, 1, 2, 0}, int64[2,1] rows = {1, 0},
    int64[2] inner = {0, 2}, int64[3] joined = {6, -1, 4}, float[4] c = {1.0, 2.0, 3.0, 4.0}"""

# Each reads v [2, 3, frames, 4] and gives y with the frames on the axis named; None: they don't stay apart.
CASES = {
    "y = Transpose<perm=[2,0,1,3]>(v)": 0,
    "y = Transpose<perm=[3,2,1,0]>(v)": 1,
    "y = Gather<axis=0>(v, ends)": 2,
    "y = Gather<axis=1>(v, pairs)": 3,
    "y = Gather<axis=3>(v, ends)": 2,
    "y = Gather<axis=2>(v, ends)": None,
    "y = GatherND(v, rows)": 2,
    "y = GatherND(v, pairs2)": 1,
    "y = Mul(v, c)": 2,
    "y = Sqrt(v)": 2,
    "y = Softmax<axis=1>(v)": 2,
    "y = Softmax<axis=2>(v)": None,
    "y = CumSum(v, zero)": 2,
    "y = CumSum(v, two)": None,
    "y = ReduceMean<keepdims=1>(v, inner)": None,
    "y = ReduceMean<keepdims=1>(v, outer)": 2,
    "y = ReduceMax<keepdims=0>(v, outer)": 1,
    "y = ReduceMax<keepdims=0>(v)": None,
    "y = Slice(v, one, two, zero)": 2,
    "y = Slice(v, step, far, two, step)": None,
    "y = Concat<axis=1>(v, v)": 2,
    "y = Concat<axis=2>(v, v)": None,
    "y, z = Split<axis=0, num_outputs=2>(v)": 2,
    "y = Reshape(v, joined)": 1,
    "y = MatMul(v, square)": None,
    "y = Unsqueeze(v, zero)": 3,
}
MORE = "int64[2,2] pairs2 = {0, 1, 1, 2}, int64[2] outer = {0, 3}, float[4,4] square = {%s}" % ",".join(  # noqa: UP031
    str(float(i)) for i in range(16)
)


def model_of(body: str) -> onnx.ModelProto:
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[2,3,frames,4] v) => (float y) <{CONSTANTS}, {MORE}> {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


@pytest.mark.parametrize("body", CASES)
def test_a_rule_says_what_the_operator_does(body):
    axis = CASES[body]
    (node,) = ir.from_proto(model_of(body)).graph
    value = node.outputs[0]
    if axis is not None and not frame_dims(value):  # what inference does not tell, a trace does
        shape = list(value.shape)
        shape[axis] = ir.SymbolicDim("frames")
        value.shape = ir.Shape(shape)
    told = [at for at, text in frame_dims(value) if text == "frames"]
    found = next((at for at in told if frames_stay_apart(node, at)), None)
    assert found == axis
    if axis is None:
        return
    session = ort.InferenceSession(model_of(body).SerializeToString(), providers=["CPUExecutionProvider"])
    v = np.random.default_rng(0).random((2, 3, FRAMES, 4)).astype(np.float32)
    before = session.run(["y"], {"v": v})[0]
    assert before.shape[axis] == FRAMES
    for frame in range(FRAMES):
        other = v.copy()
        other[:, :, frame] += 1
        differs = session.run(["y"], {"v": other})[0] != before
        others = np.delete(differs, frame, axis)
        assert differs.any() and not others.any()


def test_frames_that_an_input_has_elsewhere_are_no_frames_of_the_output():
    body = "t = Transpose<perm=[0,1,3,2]>(v) y = Add(v, t)"
    *_, add = ir.from_proto(model_of(body)).graph
    assert not frames_stay_apart(add, 2)
