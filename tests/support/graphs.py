"""Graphs for tests: written as ONNX text, run in ONNX Runtime with its optimiser off."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from dvexport.dialect import attach_references, operator_of
from dvexport.graph.state import states_of
from dvexport.passes.check_dialect import CheckDialect

__all__ = ["check", "data", "graph", "infer", "node_of", "ops", "run", "run_steps", "session", "weights"]

_HEADER = '<ir_version: 10, opset_import: ["": 20, "dv": 1]>\n'


def data(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weights(cout: int, cin: int, kernel: int, seed: int = 0) -> np.ndarray:
    """A weight that keeps the variance of what it convolves."""
    return data(cout, cin, kernel, kernel, seed=seed) / np.float32(np.sqrt(cin * kernel**2))


def graph(text: str, **constants: np.ndarray) -> ir.Model:
    """Read ONNX text; inputs named in `constants` become initializers, and shapes are inferred throughout."""
    model = ir.from_onnx_text(_HEADER + text)
    for value in list(model.graph.inputs):
        if value.name in constants:
            model.graph.inputs.remove(value)
            tensor = ir.tensor(np.ascontiguousarray(constants[value.name]), name=value.name)
            value.const_value, value.shape, value.type = tensor, ir.Shape(tensor.shape), ir.TensorType(tensor.dtype)
            model.graph.register_initializer(value)
    infer(model)
    return model


def infer(model: ir.Model) -> None:
    """Set every shape: those of the dialect by its own rules, the others by ONNX, until nothing is new."""
    for _ in range(1 + sum(operator_of(node) is not None for node in model.graph)):
        proto = onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True)
        known = {value.name: ir.from_proto(value) for value in proto.graph.value_info}
        for node in model.graph:
            for value in node.outputs:
                if value.shape is None and value.name in known:
                    value.shape, value.type = known[value.name].shape, known[value.name].type
            operator = operator_of(node)
            if operator is not None and all(v is None or v.shape is not None for v in node.inputs):
                operator.infer(node)


def check(model: ir.Model) -> None:
    """Raise PassError if the model is not legal."""
    CheckDialect()(model)


def ops(model: ir.Model) -> list[str]:
    """Operators in graph order, those of the dialect as `dv.X`; constants left out."""
    names = [f"{node.domain}.{node.op_type}".lstrip(".") for node in model.graph]
    return [name for name in names if name != "Constant"]


def node_of(model: ir.Model, op_type: str) -> ir.Node:
    """The only node of its type."""
    (node,) = (node for node in model.graph if node.op_type == op_type)
    return node


def session(model: ir.Model, *, optimised: bool = False) -> onnxruntime.InferenceSession:
    """Load a copy, with references for what is left of the dialect."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(attach_references(model.clone()))
    return onnxruntime.InferenceSession(proto.SerializeToString(), options)


def run(model: ir.Model, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs by name."""
    loaded = session(model)
    names = [output.name for output in loaded.get_outputs()]
    return dict(zip(names, loaded.run(names, feeds), strict=True))


def run_steps(
    model: ir.Model, feeds: Mapping[str, np.ndarray], *, loaded: onnxruntime.InferenceSession | None = None
) -> dict[str, np.ndarray]:
    """Feed axis 0 of every input frame by frame from zero states; stack the outputs that are not states."""
    loaded = loaded or session(model)
    states = states_of(model)
    names = [output.name for output in loaded.get_outputs()]
    kept = {state.input: np.zeros(state.shape, state.dtype) for state in states}
    fed_back = {state.output for state in states}
    frames: list[dict[str, np.ndarray]] = []
    for t in range(len(next(iter(feeds.values())))):
        step = {name: value[t : t + 1] for name, value in feeds.items()}
        outputs = dict(zip(names, loaded.run(names, {**step, **kept}), strict=True))
        kept = {state.input: outputs[state.output] for state in states}
        frames.append({name: value for name, value in outputs.items() if name not in fed_back})
    return {name: np.concatenate([frame[name] for frame in frames]) for name in frames[0]}
