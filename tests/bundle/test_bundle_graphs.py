"""Graphs of bundles refer to the manifest's weights and to no other file, however ONNX lets them."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from bundles import shared, small_bundle
from onnx import TensorProto, helper

import dvexport
from dvexport.bundle.archive import Bundle, write_bundle
from dvexport.bundle.graphs import read_graph, read_model
from dvexport.bundle.levels import read_level
from dvexport.errors import BundleError, DeviceError
from dvexport.graph.weights import WEIGHTS
from dvexport.run.open import open_session, variant_of
from dvexport.targets.onnx.runtime import OrtSession
from dvexport.verify import verify

TINY = {"depth": 3, "embed_dim": 24, "heads": 3, "size": (32, 32), "classes": 4, "sta_r": 1, "sta_groups": (1, 1, 1)}
GRAPHS = ("model.onnx", "gate_level.onnx", "dense_level.onnx")


@functools.cache
def pruned() -> Bundle:
    """A transformer that drops tokens: three graphs, and weights in a file of their own."""
    made = shared("pruned.dvx", lambda path: dvexport.export("vit_small", settings=TINY, backend="onnx", output=path))
    return Bundle.open(made)


def bundle_of(graph: str) -> Bundle:
    """One that has this graph; without a file of weights where it can be."""
    return pruned() if graph == "dense_level.onnx" else small_bundle("dstep_resnet18", "stream")


def changed(path: Path, bundle: Bundle, graph: str, change) -> Bundle:
    """The bundle with one graph changed; its digests hold."""
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    model = onnx.load_model_from_string(files[graph])
    change(model)
    return write_bundle(path / "changed.dvx", bundle.manifest, {**files, graph: model.SerializeToString()})


def outside(location: str | None, name: str = "stolen") -> TensorProto:
    """A tensor of eight numbers that lie in a file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[8], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": "32"}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return tensor


def _branch(*nodes: onnx.NodeProto, initializer: tuple[TensorProto, ...] = ()) -> onnx.GraphProto:
    output = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [8])
    return helper.make_graph(list(nodes), "branch", [], [output], initializer=initializer)


def _if(branch: onnx.GraphProto) -> list[onnx.NodeProto]:
    condition = helper.make_node(
        "Constant", [], ["always"], value=helper.make_tensor("t", TensorProto.BOOL, [], [True])
    )
    return [condition, helper.make_node("If", ["always"], ["chosen"], then_branch=branch, else_branch=branch)]


def _sparse(values: TensorProto) -> onnx.SparseTensorProto:
    indices = helper.make_tensor("places", TensorProto.INT64, [8], range(8))
    return helper.make_sparse_tensor(values, indices, [8])


def _function(tensor: TensorProto, domain: str = "others") -> onnx.FunctionProto:
    node = helper.make_node("Constant", [], ["y"], value=tensor)
    return helper.make_function(domain, "Stolen", [], ["y"], [node], [helper.make_opsetid("", 20)])


def _called(model: onnx.ModelProto, function: onnx.FunctionProto) -> None:
    model.functions.append(function)
    model.opset_import.add(domain=function.domain, version=1)
    model.graph.node.append(helper.make_node("Stolen", [], ["unused"], domain=function.domain))


def _default(tensor: TensorProto) -> onnx.FunctionProto:
    function = _function(TensorProto(data_type=TensorProto.FLOAT, dims=[0]))
    function.attribute_proto.append(helper.make_attribute("a", tensor))
    return function


def constant(tensor: TensorProto, output: str = "inner") -> onnx.NodeProto:
    return helper.make_node("Constant", [], [output], value=tensor)


def nested(tensor: TensorProto) -> list[onnx.NodeProto]:
    return _if(_branch(*_if(_branch(constant(tensor))), helper.make_node("Identity", ["chosen"], ["inner"])))


def _sparse_constant(tensor: TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["unused"], sparse_value=_sparse(tensor))


def _list_attribute(tensor: TensorProto) -> onnx.NodeProto:
    node = helper.make_node("Identity", ["frames"], ["unused"])
    node.attribute.add(name="several", type=onnx.AttributeProto.TENSORS).tensors.append(tensor)
    return node


KINDS = {
    "initializer": lambda m, t: m.graph.initializer.append(t),
    "sparse initializer": lambda m, t: m.graph.sparse_initializer.append(_sparse(t)),
    "constant": lambda m, t: m.graph.node.insert(0, constant(t, "unused")),
    "sparse constant": lambda m, t: m.graph.node.append(_sparse_constant(t)),
    "list of tensors": lambda m, t: m.graph.node.append(_list_attribute(t)),
    "initializer of a branch": lambda m, t: m.graph.node.extend(
        _if(_branch(helper.make_node("Identity", ["stolen"], ["inner"]), initializer=(t,)))
    ),
    "constant of a branch": lambda m, t: m.graph.node.extend(_if(_branch(constant(t)))),
    "sparse initializer of a branch": lambda m, t: m.graph.node.extend(
        _if(helper.make_graph([constant(t)], "b", [], [], sparse_initializer=[_sparse(t)]))
    ),
    "branch of a branch": lambda m, t: m.graph.node.extend(nested(t)),
    "body of a loop": lambda m, t: m.graph.node.append(
        helper.make_node("Loop", ["", ""], ["unused"], body=_branch(constant(t)))
    ),
    "function": lambda m, t: _called(m, _function(t)),
    "function's default": lambda m, t: _called(m, _default(t)),
    "training": lambda m, t: m.training_info.add().initialization.initializer.append(t),
    "training algorithm": lambda m, t: m.training_info.add().algorithm.node.append(constant(t)),
}


@pytest.fixture
def lure(tmp_path, monkeypatch):
    """Files that a graph must not read, beside, above and in the working folder."""
    (tmp_path / "work").mkdir()
    for name in ("secret.bin", "work/secret.bin", f"work/{WEIGHTS}"):
        (tmp_path / name).write_bytes(np.arange(8, dtype=np.float32).tobytes())
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_tensor_in_another_file_is_refused(lure, graph, kind):
    bundle = changed(lure, bundle_of(graph), graph, lambda model: kind(model, outside("secret.bin")))
    with pytest.raises(BundleError, match=r"refers to a file|a weight can't be read|brings an operator along"):
        read_graph(bundle, graph)


LOCATIONS = {
    "absolute": "{folder}/secret.bin", "above": "../secret.bin", "working folder": "secret.bin", "url": "file:///{folder}",
    "through": "./secret.bin", "no name": "", "no location": None,
    "weights that the manifest has not": f"other/{WEIGHTS}",
    "native weights that it has not": "native/weights.bin", "another file of the bundle": "golden.safetensors",
    "the graph": "gate_level.onnx", "dots": "./weights.bin", "memory": "*/_ORT_MEM_ADDR_/*", "device": "/dev/zero",
}  # fmt: skip


@pytest.mark.parametrize("graph", GRAPHS[:2])
@pytest.mark.parametrize("location", LOCATIONS.values(), ids=LOCATIONS)
def test_every_spelling_of_another_file_is_refused(lure, graph, location):
    place = location and location.format(folder=lure)
    bundle = changed(lure, bundle_of(graph), graph, lambda model: model.graph.initializer.append(outside(place)))
    opening = (
        (lambda: open_session(bundle)) if graph == "model.onnx" else (lambda: open_session(bundle, variant="dense"))
    )
    with pytest.raises(BundleError, match="a weight can't be read") as error:
        opening()
    assert f"'{place}', and the bundle's file of weights is weights.bin" in error.value.why
    with pytest.raises(BundleError, match="a weight can't be read"):
        verify(bundle)


def test_the_dense_model_is_read_no_other_way(lure):
    bundle = changed(lure, pruned(), "dense_level.onnx", lambda m: m.graph.initializer.append(outside("../secret.bin")))
    open_session(bundle)
    for use in (lambda: read_level(bundle, "dense"), lambda: open_session(bundle, variant="dense")):
        with pytest.raises(BundleError, match=r"the bundle's file of weights is weights\.bin"):
            use()


def test_what_is_refused_would_have_been_read(lure):
    """Both readers do open a file of the working folder where nobody checks."""
    import onnx_ir as ir

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [8]) for name in "xy")
    nodes = [helper.make_node("Add", ["x", "stolen"], ["y"])]
    graph = helper.make_graph(nodes, "g", [x], [y], [outside("secret.bin")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": np.zeros(8, np.float32)})[0], np.arange(8))
    tensor = ir.from_proto(model).graph.initializers["stolen"].const_value
    np.testing.assert_array_equal(tensor.numpy(), np.arange(8))


def _weight(model: onnx.ModelProto) -> TensorProto:
    return next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)


def _twice(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(_weight(model))


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: _weight(m).external_data.add(key="location", value="secret.bin"), "location, location"),
        (lambda m: _weight(m).external_data.add(key="basepath", value="/"), "basepath"),
        (lambda m: _weight(m).external_data.add(key="checksum", value="0"), "checksum"),
        (lambda m: _weight(m).ClearField("data_location"), "that it is in none"),
        (_twice, "there are two of its name"),
        (lambda m: _weight(m).external_data[1].__setattr__("value", "-64"), "bytes -64"),
        (lambda m: _weight(m).external_data[1].__setattr__("value", str(1 << 40)), f"bytes {1 << 40}"),
        (lambda m: _weight(m).external_data[1].__setattr__("value", "1"), "bytes 1 to"),
        (lambda m: _weight(m).dims.append(3), "of shape"),
    ],
)
def test_a_place_among_the_weights_that_is_none(tmp_path, graph, change, why):
    bundle = changed(tmp_path, pruned(), graph, change)
    variant = {"model.onnx": "gated", "gate_level.onnx": "forced", "dense_level.onnx": "dense"}[graph]
    with pytest.raises(BundleError, match="a weight can't be read") as error:
        variant_of(bundle, variant)
    assert why in error.value.why


def _context(model: onnx.ModelProto) -> None:
    model.opset_import.add(domain="com.microsoft", version=1)
    attributes = {"embed_mode": 0, "ep_cache_context": "../secret.bin", "main_context": 1}
    model.graph.node.append(helper.make_node("EPContext", ["frames"], ["unused"], domain="com.microsoft", **attributes))


def _options(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key="ort_config", value='{"session_options": {"optimized_model_filepath": "written"}}')


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_context, "EPContext of domain 'com.microsoft'"),
        (lambda m: m.graph.node.extend(_if(_branch(helper.make_node("X", [], ["inner"], domain="x")))), "X of domain"),
        (_options, "metadata 'ort_config'"),
        (lambda m: m.functions.append(_function(TensorProto(data_type=1, dims=[0]), "dv")), "domain 'dv'"),
        (lambda m: m.functions.append(_function(TensorProto(data_type=1, dims=[0]), "")), "domain ''"),
        (lambda m: (m.functions.append(_function(TensorProto(), "com.microsoft")), _context(m)), "Stolen of domain"),
    ],
)
def test_what_else_a_runtime_might_load_is_refused(tmp_path, graph, change, why):
    bundle = changed(tmp_path, bundle_of(graph), graph, change)
    with pytest.raises(BundleError, match="a graph of the bundle is refused") as error:
        read_graph(bundle, graph)
    assert why in error.value.why


def test_an_artifact_in_the_runtimes_own_format_is_none(tmp_path):
    """ONNX Runtime tells it by its bytes, under any name."""
    bundle = small_bundle("dstep_resnet18", "stream")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    for name in ("model.onnx", WEIGHTS):
        (tmp_path / name).write_bytes(bundle.read(name))
    ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    own = (tmp_path / "model.ort").read_bytes()
    assert ort.InferenceSession(own, providers=["CPUExecutionProvider"]).get_inputs()
    with pytest.raises(DeviceError, match="can't load the model"):
        OrtSession(own)
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    with pytest.raises(BundleError, match="can't be read"):
        open_session(write_bundle(tmp_path / "x.dvx", bundle.manifest, {**files, "model.onnx": own}))


def test_the_runtime_gets_what_was_checked_and_no_more(tmp_path):
    """A field that this reader does not know might be a reference to another."""
    bundle = small_bundle("dstep_resnet18", "stream")
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    unknown = b"\xfa\x7d\x06secret"  # field 2015, six bytes
    more = write_bundle(tmp_path / "x.dvx", bundle.manifest, {**files, "model.onnx": files["model.onnx"] + unknown})
    assert variant_of(more, "gated").model == files["model.onnx"]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.graph.initializer[0].__setattr__("data_type", 99),
        lambda m: m.graph.node.append(helper.make_node("Identity", ["frames"], ["frames"])),
    ],
)
def test_a_graph_that_contradicts_itself_is_a_bundle_error(tmp_path, change):
    bundle = changed(tmp_path, small_bundle("dstep_resnet18", "stream"), "gate_level.onnx", change)
    with pytest.raises(BundleError, match="can't be read"):
        read_model(bundle, "gate_level.onnx")
