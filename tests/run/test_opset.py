"""Artifacts at older opsets: legal there, and of the same numbers; what has no meaning there is refused by name."""

from __future__ import annotations

import os
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from bundles import inlined, noise, small_model
from lowest import EXTRAS, lowest

from dvexport.bundle.unpack import unpack
from dvexport.errors import UsageError
from dvexport.export import export
from dvexport.graph.graph import OPSET
from dvexport.run.open import open_session
from dvexport.targets import catalogue
from dvexport.targets.onnx.emit import emit
from dvexport.targets.onnx.opset import OLDEST
from dvexport.targets.onnx.table import OnnxTable, newest_opset, oldest_version
from dvexport.verify import verify

NODES = {
    "reduce_axes": "z = ReduceMean<keepdims = 0>(x, axes)",
    "reduce_all": "z = ReduceMax(x)",
    "split_equal": "a, z = Split<num_outputs = 2, axis = 2>(x)",
    "split_rest": "a, b, z = Split<num_outputs = 3, axis = 3>(x)",
    "pad_axes": "z = Pad(x, two, , axes)",
    "shape_part": "z = Shape<start = 1, end = -1>(x)",
    "layer_norm": "z = LayerNormalization<axis = -1, epsilon = 0.01>(x, scale, scale)",
    "layer_norm_many": "z = LayerNormalization<axis = 1>(x, plane)",
    "hard_swish": "z = HardSwish(x)",
    "mish": "z = Mish(x)",
    "gelu": "z = Gelu(x)",
    "gelu_tanh": 'z = Gelu<approximate = "tanh">(x)',
    "reshape": "z = Reshape<allowzero = 0>(x, rows)",
    "reshape_no_zero": "z = Reshape<allowzero = 1>(x, rows)",
    "resize": 'z = Resize<mode = "linear", antialias = 0>(x, , scales)',
    "nested": """c = ReduceMax<keepdims = 0>(x)
        zero = Constant<value = float {0.0}>()
        positive = Greater(c, zero)
        z = If<then_branch = g1 () => (float[2, 1, 1, 1] t) { t = ReduceMean(x, last) },
               else_branch = g2 () => (float[2, 1, 1, 1] e) { e = ReduceMin(x, last) }>(positive)""",
}
CONSTANTS = """int64[2] axes = {1, -1}, int64[4] two = {1, 0, 0, 2}, int64[2] rows = {2, 60}, int64[3] last = {1, 2, 3},
    float[5] scale = {1.0, 2.0, -1.0, 0.5, 0.0}, float[4] scales = {1.0, 1.0, 2.0, 2.0},
    float[3, 4, 5] plane = {%s}""" % ", ".join(str(0.1 * i) for i in range(60))  # noqa: UP031


def graph(node: str) -> ir.Model:
    result = "int64[2] z" if "Shape<" in node else "float z"
    text = f'<ir_version: 10, opset_import: ["" : {OPSET}]> g (float[2, 3, 4, 5] x) => ({result}) <{CONSTANTS}>'
    model = onnx.parser.parse_model(f"{text} {{ {node} }}")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def run(model: bytes) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(["z"], {"x": x})[0]


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("opset", [13, 14, 15, 17, 18, 19])
def test_a_node_means_the_same_at_an_older_opset(node, opset):
    model = graph(NODES[node])
    written = emit(model, opset=opset)
    proto = onnx.load_from_string(written)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ir_version == onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", opset]
    np.testing.assert_allclose(run(written), run(emit(model)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("node", "opset", "why"),
    [
        ("z = Trilu(x)", 13, "Trilu node '': opset 13 does not have it"),
        ("s = Shape(x) k = Slice(s, axes, axes) z = ReduceMean(x, k)", 17, "one of its inputs is computed"),
        ('z = Resize<mode = "linear", antialias = 1>(x, , scales)', 17, "does not know its attribute antialias"),
        ('z = Resize<mode = "linear", coordinate_transformation_mode = "half_pixel_symmetric">(x, , scales)', 18,
         "opset 19 redefined it"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_there_is_refused_by_name(node, opset, why):
    with pytest.raises(UsageError, match=f"can't be written in opset {opset}") as caught:
        emit(graph(node), opset=opset)
    assert why in f"{caught.value.where}: {caught.value.why}"
    assert caught.value.hint.startswith(f"--opset {OPSET}")


@pytest.mark.parametrize("opset", [13, 15, 17, 20])
def test_a_bundle_at_an_opset(opset, tmp_path):
    model = small_model("dstep_resnet18")
    bundle = export(model, backend="onnx", opset=opset, output=tmp_path / "x.dvx")
    proto = onnx.load_from_string(inlined(bundle))
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    assert proto.ir_version == onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", opset]
    onnx.checker.check_model(proto, full_check=True)
    assert verify(bundle).ok
    assert np.isfinite(open_session(bundle).run_clip(noise())[-1].logits).all()


@pytest.mark.parametrize(("opset", "backend"), [(12, "onnx"), (21, "onnx"), (True, "onnx"), (18, "tvm")])
def test_an_opset_that_can_t_be_is_refused(opset, backend, tmp_path):
    with pytest.raises(UsageError, match=f"an opset must be a whole number from {OLDEST} to {OPSET}|has no opset"):
        export(small_model("dstep_resnet18"), backend=backend, opset=opset, output=tmp_path / "x.dvx")


@pytest.mark.parametrize(
    ("version", "newest"), [("1.6", 0), ("1.7.1", 13), ("1.13.1", 17), ("1.17", 20), ("1.27.0", 21), ("2", 21)]
)
def test_what_a_runtime_reads(version, newest):
    assert newest_opset(version) == newest


def test_every_target_s_runtime_reads_its_opset():
    for name in catalogue.names():
        said = catalogue.load(name).runtime(OnnxTable)
        assert said is None or said.opset <= newest_opset(said.min_version)


def test_a_target_whose_runtime_does_not_is_refused():
    with pytest.raises(ValueError, match=r"ONNX Runtime 1\.13 reads opsets up to 17"):
        OnnxTable(opset=18, min_version="1.13")


RUN = """
import sys, numpy as np, onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
states = dict(pair.split("=") for pair in sys.argv[4:])
types = {"tensor(float)": np.float32, "tensor(bool)": bool, "tensor(int64)": np.int64}
held = {one.name: np.zeros(one.shape, types[one.type]) for one in session.get_inputs() if one.name in states}
names, rows = [one.name for one in session.get_outputs()], []
for frame in np.load(sys.argv[2]):
    got = dict(zip(names, session.run(names, {"frames": frame[None], **held})))
    held = {name: got[after] for name, after in states.items()}
    rows.append(got["logits"][0])
np.save(sys.argv[3], rows)
print(ort.__version__)
"""
"""A stream by hand, as on a device: states in, states out."""


@pytest.mark.parametrize("name", ["dstep_resnet18", "adafuse_resnet18"])
def test_the_oldest_runtime_of_the_catalogue_runs_artifacts(name, tmp_path):
    python = os.environ.get("DVEXPORT_OLDEST_RUNTIME")
    if python is None:
        pytest.skip("make test-minimum has the environment with the oldest runtime")
    target = next(
        each for each in catalogue.names() if (said := catalogue.load(each).runtime(OnnxTable))
        and said.min_version == oldest_version()
    )  # fmt: skip
    bundle = export(small_model(name), backend="onnx", target=target, output=tmp_path / "x.dvx")
    unpack(bundle, tmp_path / "files")
    np.save(tmp_path / "frames.npy", noise())
    states = [f"{one.input}={one.output}" for one in bundle.manifest.states]
    files = [tmp_path / "files" / "model.onnx", tmp_path / "frames.npy", tmp_path / "logits.npy"]
    done = subprocess.run([python, "-c", RUN, *files, *states], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(oldest_version())
    with open_session(bundle) as session:
        wanted = [step.logits for step in session.run_clip(noise())]
    np.testing.assert_allclose(np.load(files[2]), wanted, atol=1e-4)


def test_the_lowest_versions_are_those_of_the_project():
    found = dict(requirement.split("==") for requirement in lowest())
    table = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert len(found) == sum(map(len, (table["dependencies"], *(table["optional-dependencies"][e] for e in EXTRAS))))
    assert found["torch"] == "2.13"
