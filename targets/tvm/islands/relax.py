"""From ONNX nodes to loop nests: TVM's Relax knows the operators, this module asks it.

An island is turned into a small ONNX model, imported, decomposed and legalised. What comes out is a list of calls of
TIR functions, each with its tensors named. Large float constants are handed to Relax as inputs: the loops
don't depend on their values, so islands that differ in weights only are converted once.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from dvexport.errors import UsageError
from dvexport.graph.graph import DV, OPSET, array_of, source_of, static_shape
from dvexport.graph.match import is_op

__all__ = ["Call", "Program", "canonical_model", "lower", "refuse", "unknown_operators"]

_INLINE_CONSTANTS = 64
"""Float constants of at most so many elements are part of the program: exponents, limits, sizes."""


@dataclass
class Call:
    """One TIR function applied to tensors, outputs last."""

    func: Any
    tensors: list[str]


@dataclass
class Program:
    """Calls in the order of execution.

    Attributes:
        tensors: element type and shape by name.
        constants: arrays that the conversion made or kept.
        outputs: the tensor that holds each output.
    """

    calls: list[Call] = field(default_factory=list)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)


def unknown_operators(nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Return the nodes whose operator Relax has no converter for."""
    from tvm.relax.frontend.onnx import onnx_frontend

    known = onnx_frontend._get_convert_map()
    return [node for node in nodes if node.domain not in ("", "ai.onnx") or known.get(node.op_type) is None]


def canonical_model(
    nodes: Sequence[ir.Node], inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]
) -> tuple[bytes, dict[str, np.ndarray]]:
    """Return an island as a serialised ONNX model whose names say nothing, and its large constants by input name.

    Inputs are `x0`, `x1`, ...; large constants follow as inputs `w0`, `w1`, ...; outputs are `y0`, `y1`, ....
    """
    return _Writer(inputs).model(nodes, outputs)


class _Writer:
    def __init__(self, inputs: Sequence[ir.Value]) -> None:
        self.names: dict[ir.Value, str] = {value: f"x{i}" for i, value in enumerate(inputs)}
        self.inputs = [_info(f"x{i}", value) for i, value in enumerate(inputs)]
        self.large: dict[str, np.ndarray] = {}
        self.small: list[onnx.TensorProto] = []
        self.nodes: list[onnx.NodeProto] = []

    def model(self, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> tuple[bytes, dict[str, np.ndarray]]:
        for node in nodes:
            if not is_op(node, "Constant"):
                self._node(node)
        results = []
        for i, value in enumerate(outputs):
            self.nodes.append(onnx.helper.make_node("Identity", [self._name(value)], [f"y{i}"]))
            results.append(onnx.helper.make_empty_tensor_value_info(f"y{i}"))
        graph = onnx.helper.make_graph(self.nodes, "island", self.inputs, results, self.small)
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10)
        return model.SerializeToString(deterministic=True), self.large

    def _node(self, node: ir.Node) -> None:
        folded = _folded_norm(node)
        if folded is not None:
            scaled = f"v{len(self.names)}s"
            self.nodes.append(
                onnx.helper.make_node("Mul", [self._name(node.inputs[0]), self._constant(folded[0])], [scaled])
            )
            self.nodes.append(onnx.helper.make_node("Add", [scaled, self._constant(folded[1])], [self._new(node)]))
            return
        if _selects_all(node):
            self.nodes.append(onnx.helper.make_node("Identity", [self._name(node.inputs[0])], [self._new(node)]))
            return
        proto = ir.serde.serialize_node(node)
        del proto.input[:], proto.output[:], proto.metadata_props[:]
        proto.name = proto.doc_string = ""
        proto.input.extend(self._name(value) for value in node.inputs)
        proto.output.extend(self._new(node, i) for i in range(len(node.outputs)))
        attributes = sorted(proto.attribute, key=lambda attribute: attribute.name)
        del proto.attribute[:]
        proto.attribute.extend(attributes)
        self.nodes.append(proto)

    def _new(self, node: ir.Node, index: int = 0) -> str:
        return self.names.setdefault(node.outputs[index], f"v{len(self.names)}")

    def _name(self, value: ir.Value | None) -> str:
        if value is None:
            return ""
        if value not in self.names:
            array = array_of(value)
            if array is None:
                raise UsageError(f"an island reads '{value.name}', which nothing provides", where=value.name)
            self.names[value] = self._constant(array)
        return self.names[value]

    def _constant(self, array: np.ndarray) -> str:
        if array.dtype == np.float32 and array.size > _INLINE_CONSTANTS:
            name = f"w{len(self.large)}"
            self.large[name] = np.ascontiguousarray(array)
            self.inputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, array.shape))
            return name
        name = f"k{len(self.small)}"
        self.small.append(onnx.numpy_helper.from_array(array, name))
        return name


def _info(name: str, value: ir.Value) -> onnx.ValueInfoProto:
    if value.dtype is None:
        raise UsageError("an input of generic kernels must have a known element type", where=value.name)
    return onnx.helper.make_tensor_value_info(name, int(value.dtype), static_shape(value))


def _folded_norm(node: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Return factor and summand of a batch normalisation with constant statistics, in the shape of a channel."""
    if not is_op(node, "BatchNormalization") or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    arrays = [array_of(value) for value in node.inputs[1:5]]
    training: int = node.attributes.get_int("training_mode", 0)
    if any(array is None for array in arrays) or training:
        return None
    scale, bias, mean, variance = (np.asarray(array, np.float64) for array in arrays)
    factor = scale / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    shape = (1, -1, *[1] * (len(node.inputs[0].shape) - 2))
    return factor.astype(np.float32).reshape(shape), (bias - mean * factor).astype(np.float32).reshape(shape)


def _selects_all(node: ir.Node) -> bool:
    """Whether a Gather takes every element of its axis in order."""
    if not is_op(node, "Gather") or node.inputs[0] is None or node.inputs[0].shape is None:
        return False
    index, size = array_of(node.inputs[1]), node.inputs[0].shape[node.attributes.get_int("axis", 0)]
    return index is not None and isinstance(size, int) and np.array_equal(index, np.arange(size))


def lower(model: bytes) -> Program:
    """Return the loop nests of a model made by `canonical_model`.

    Constants are not folded here: TVM compiles and runs every piece for that. What is computed from constants alone is
    inlined later, and folded by LLVM.

    Raises:
        UsageError: Relax does not know an operator, or leaves a call that no TIR function does.
    """
    import tvm
    from tvm.relax.frontend.onnx import from_onnx

    from dvexport.targets.tvm.islands.legalize import LEGALIZE

    passes = tvm.relax.transform
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # outputs without a type: they have the one that follows
        module = from_onnx(onnx.load_model_from_string(model), keep_params_in_input=False)
    with tvm.target.Target({"kind": "llvm"}):
        module = tvm.transform.Sequential(
            [
                passes.DecomposeOpsForInference(),
                passes.LegalizeOps(LEGALIZE),
                passes.DeadCodeElimination(),
            ]
        )(module)
    return _Reader(module).program()


class _Reader:
    """Reads the straight list of calls out of a legalised module."""

    def __init__(self, module: Any) -> None:
        self.module, self.made = module, Program()
        self.names: dict[Any, Any] = {}

    def program(self) -> Program:
        main = self.module["main"]
        for parameter in main.params:
            self.names[parameter] = self._tensor(parameter.name, parameter.ty)
        for block in main.body.blocks:
            for binding in block.bindings:
                self.names[binding.var] = self._value(binding.value, binding.var.ty)
        result = self._value(main.body.body, None)
        self.made.outputs = list(result) if isinstance(result, tuple) else [result]
        return self.made

    def _tensor(self, name: str, type_: Any) -> str:
        self.made.tensors[name] = (str(type_.dtype), tuple(int(size) for size in type_.shape.values))
        return name

    def _value(self, value: Any, type_: Any) -> Any:
        kind = type(value).__name__
        if value in self.names:
            return self.names[value]
        if kind == "Tuple":
            return tuple(self._value(each, None) for each in value.fields)
        if kind == "TupleGetItem":
            return self._value(value.tuple_value, None)[value.index]
        if kind in ("GenericConst", "Constant"):
            array = value.value.numpy()
            name = f"c{len(self.made.constants)}"
            self.made.constants[name] = array
            self.made.tensors[name] = (str(array.dtype), array.shape)
            return name
        if kind == "Call" and getattr(value.op, "name", "") == "relax.call_tir":
            return self._call(value, type_)
        op = getattr(getattr(value, "op", None), "name", kind)
        raise UsageError(
            "TVM can't convert a part of the model", why=f"'{op}' is left to a library that is not on the device"
        )

    def _call(self, value: Any, type_: Any) -> Any:
        number = len(self.made.calls)
        many = type(type_).__name__ == "TupleType"
        outputs = [self._tensor(f"t{number}_{i}", each) for i, each in enumerate(type_.fields if many else [type_])]
        inputs = [self._value(argument, None) for argument in value.args[1].fields]
        self.made.calls.append(Call(self.module[value.args[0]], [*inputs, *outputs]))
        return tuple(outputs) if many else outputs[0]


def refuse(node: ir.Node, why: str) -> UsageError:
    """Return the error for a node that has no kernel."""
    operator = f"{node.domain}.{node.op_type}" if node.domain == DV else node.op_type
    return UsageError(
        f"the native backend has no kernel for the operator '{operator}'",
        where=source_of(node),
        why=why,
        hint="replace the operator in the model, or export with another backend: --backend onnx",
    )
