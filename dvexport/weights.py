"""Weights apart from graphs: one file of them serves every graph of a bundle, and no graph nears 2 GiB.

A graph refers to its weights as external data (ONNX), by offset and length in `WEIGHTS`. Equal arrays are stored
once. In memory nothing is copied: graphs hold the arrays of the torch model or of the mapped bundle, and ONNX Runtime
is handed the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx
import onnx_ir as ir

from dvexport.bundle import ALIGNMENT, WEIGHTS
from dvexport.errors import BundleError

__all__ = ["ALIGNMENT", "WEIGHTS", "WeightFile", "attach_weights", "external_arrays", "share_weights", "split_weights"]

_SMALLEST = 1024
"""Bytes from which a constant is a weight: shapes, axes and scales stay in the graph, where optimisers see them."""


@dataclass
class WeightFile:
    """The weights of some graphs, each array once, in the order they were added."""

    arrays: list[tuple[int, np.ndarray]] = field(default_factory=list)
    size: int = 0
    _places: dict[str, int] = field(default_factory=dict)

    def add(self, array: np.ndarray) -> int:
        """Return the offset of an array's bytes, which are added unless they are there."""
        key = _digest(array)
        if key not in self._places:
            offset = -(-self.size // ALIGNMENT) * ALIGNMENT
            self._places[key] = offset
            self.arrays.append((offset, array))
            self.size = offset + array.nbytes
        return self._places[key]

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the content of the file, array by array."""
        end = 0
        for offset, array in self.arrays:
            yield bytes(offset - end)
            yield np.ascontiguousarray(array).data.cast("B")
            end = offset + array.nbytes


def split_weights(model: ir.Model, file: WeightFile | None = None) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Return a model without its weights, and these by name; those in branches stay where they are.

    Args:
        model: not modified.
        file: gets the weights, and the model their places there. Without one the places mean nothing: a runtime
            is to be handed the arrays.
    """
    held: list[tuple[ir.Value, ir.TensorProtocol]] = []
    arrays: dict[str, np.ndarray] = {}
    try:
        for value in _weights(model):
            tensor, name = value.const_value, value.name
            assert tensor is not None and name is not None
            array = np.ascontiguousarray(tensor.numpy())
            offset = 0 if file is None else file.add(array)
            arrays[name] = array
            held.append((value, tensor))
            value.const_value = ir.ExternalTensor(
                WEIGHTS, offset, array.nbytes, tensor.dtype, shape=ir.Shape(array.shape), name=name
            )
        return ir.to_proto(model), arrays
    finally:
        for value, tensor in held:
            value.const_value = tensor


def external_arrays(model: onnx.ModelProto, weights: np.ndarray, *, where: str) -> dict[str, np.ndarray]:
    """Return the arrays that a graph refers to, by name, as views of a file's bytes.

    Args:
        weights: uint8, the file `WEIGHTS`.
        where: for messages.

    Raises:
        BundleError: the graph refers to another file, or to bytes that are not there.
    """
    return {
        tensor.name: _view(tensor, weights, where)
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }


def attach_weights(model: onnx.ModelProto, weights: np.ndarray, *, where: str) -> ir.Model:
    """Return a graph with the weights that it refers to, not copied; errors as `external_arrays`."""
    arrays = external_arrays(model, weights, where=where)
    read = ir.from_proto(model)
    for name, array in arrays.items():
        read.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return read


def share_weights(first: ir.Model, second: ir.Model) -> None:
    """Let the second model hold the first one's arrays where they are equal."""
    known = {_digest(v.const_value.numpy()): v.const_value for v in _weights(first)}  # type: ignore[union-attr]
    for value in _weights(second):
        assert value.const_value is not None
        value.const_value = known.get(_digest(value.const_value.numpy()), value.const_value)


def _weights(model: ir.Model) -> list[ir.Value]:
    values = model.graph.initializers.values()
    return [v for v in values if v.const_value is not None and v.const_value.nbytes >= _SMALLEST]


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).data.cast("B"))
    return digest.hexdigest()


def _view(tensor: onnx.TensorProto, weights: np.ndarray, where: str) -> np.ndarray:
    entries: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    shape = tuple(tensor.dims)
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", "-1"))
    except (KeyError, ValueError) as error:
        raise BundleError("a weight can't be read", where=f"{where}, {tensor.name}", why=str(error)) from error
    size = prod(shape) * dtype.itemsize
    if entries.get("location") != WEIGHTS:
        why = f"it is in a file '{entries.get('location')}', not in {WEIGHTS}"
    elif min(shape, default=0) < 0 or length != size or dtype.hasobject:
        why = f"{length} bytes are no {dtype} of shape {list(shape)}"
    elif offset < 0 or offset % dtype.itemsize or offset + length > weights.size:
        why = f"bytes {offset} to {offset + length} of {weights.size}"
    else:
        return weights[offset : offset + length].view(dtype).reshape(shape)
    raise BundleError("a weight can't be read", where=f"{where}, {tensor.name}", why=why)
