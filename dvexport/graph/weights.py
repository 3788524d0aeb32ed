"""Weights apart from graphs: one file of them serves every graph of a bundle, and no graph nears 2 GiB.

A graph refers to its weights as external data (ONNX), by offset and length in `WEIGHTS`. Equal arrays are stored
once. In memory nothing is copied: graphs hold the arrays of the torch model or of the bundle as it was read, and ONNX
Runtime is handed the same ones.

What an artifact holds already is not stored again. A native one keeps the factors of matrix products as its kernels
read them, in panels, and weights of convolutions in rows with a gap after each; a graph then refers to that file and
says how (`Place`), and reading it takes them apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
import onnx
import onnx_ir as ir

from dvexport.errors import BundleError

__all__ = [
    "ALIGNMENT",
    "KEYS",
    "SMALLEST",
    "WEIGHTS",
    "Place",
    "WeightFile",
    "attach_weights",
    "digest",
    "external_arrays",
    "is_weight_file",
    "panels_of",
    "pitch_of",
    "share_weights",
    "split_weights",
    "weights_read",
]

WEIGHTS = "weights.bin"
"""The weights that graphs of the bundle share. A backend's own file of them has this name too, in its folder."""

ALIGNMENT = 64
"""Bytes that its arrays, and itself in the bundle, start at a multiple of: a cache line, and the widest vector."""


SMALLEST = 1024
"""Bytes from which a constant is a weight: shapes, axes and scales stay in the graph, where optimisers see them."""


def is_weight_file(name: str) -> bool:
    """Tell whether graphs may refer to a file of their bundle: it is called `WEIGHTS`, in whatever folder of it."""
    *folders, file = name.split("/")
    return file == WEIGHTS and not {"", ".", ".."} & set(folders)


_OWN = ("dvexport.panel", "dvexport.turned", "dvexport.pitch", "dvexport.order")
"""Keys of external data beside ONNX's own, see `Place`."""

KEYS = frozenset({"location", "offset", "length", *_OWN})
"""What a graph may say of a weight's place."""

Read = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Place:
    """Where the bytes of an array are.

    Attributes:
        location: file of the bundle.
        offset, length: in it, in bytes.
        panel: 0 for the array as it is; else the matrix `[K, N]` lies as `[panels, K, panel]`, the last panel filled
            up with zeros.
        turned: the matrix is the array transposed: K are all axes but the first.
        pitch: 0, or how many elements each row along the first axis lies after the one before.
        order: the axes in the order in which they lie; empty: as they are.
    """

    location: str
    offset: int
    length: int
    panel: int = 0
    turned: bool = False
    pitch: int = 0
    order: tuple[int, ...] = ()

    def own(self) -> dict[str, str]:
        """Return what a graph says of it beside what ONNX knows."""
        said = (self.panel, int(self.turned), self.pitch, ",".join(map(str, self.order)))
        return {key: str(value) for key, value in zip(_OWN, said, strict=True) if value}


_BY_TAP = (2, 3, 1, 0)
"""The order of a convolution's weight that multiplies gathered pixels (`dvexport.passes.tiles.tile_products`)."""


@dataclass
class WeightFile:
    """The weights of some graphs, each array once, in the order they were added.

    Attributes:
        held: what other files of the bundle hold, by `digest`.
    """

    held: Mapping[str, Place] = field(default_factory=dict)
    arrays: list[tuple[int, np.ndarray]] = field(default_factory=list)
    size: int = 0
    _places: dict[str, Place] = field(default_factory=dict)

    def add(self, array: np.ndarray) -> Place:
        """Return the place of an array's bytes, which are added unless they are there, for any reader of ONNX."""
        key = digest(array)
        if key not in self._places:
            offset = -(-self.size // ALIGNMENT) * ALIGNMENT
            self._places[key] = Place(WEIGHTS, offset, array.nbytes)
            self.arrays.append((offset, array))
            self.size = offset + array.nbytes
        return self._places[key]

    def refer(self, array: np.ndarray) -> Place:
        """Return the place of an array for `attach_weights`: it may lie otherwise, or in another file (`held`)."""
        key = digest(array)
        if key in self.held:
            return self.held[key]
        if key not in self._places and array.ndim == len(_BY_TAP):
            lies = self._places.get(digest(array.transpose(_BY_TAP)))
            if lies is not None:
                return replace(lies, order=_BY_TAP)
        return self.add(array)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the content of the file, array by array."""
        end = 0
        for offset, array in self.arrays:
            yield bytes(offset - end)
            yield np.ascontiguousarray(array).data.cast("B")
            end = offset + array.nbytes


def split_weights(
    model: ir.Model, put: Callable[[np.ndarray], Place] | None = None
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Return a model without its weights, and these by name; those in branches stay where they are.

    Args:
        model: not modified.
        put: gets each weight and returns its place, which the model tells: a method of `WeightFile`. Without it the
            places mean nothing: a runtime is to be handed the arrays.
    """
    held: list[tuple[ir.Value, ir.TensorProtocol]] = []
    arrays: dict[str, np.ndarray] = {}
    places: dict[str, Place] = {}
    try:
        for value in _weights(model):
            tensor, name = value.const_value, value.name
            assert tensor is not None and name is not None
            array = np.ascontiguousarray(tensor.numpy())
            place = places[name] = Place(WEIGHTS, 0, array.nbytes) if put is None else put(array)
            arrays[name] = array
            held.append((value, tensor))
            value.const_value = ir.ExternalTensor(
                place.location, place.offset, place.length, tensor.dtype, shape=ir.Shape(array.shape), name=name
            )
        proto = ir.to_proto(model)
    finally:
        for value, tensor in held:
            value.const_value = tensor
    for initializer in proto.graph.initializer:
        for key, said in places.get(initializer.name, Place(WEIGHTS, 0, 0)).own().items():
            initializer.external_data.add(key=key, value=said)
    return proto, arrays


def external_arrays(model: onnx.ModelProto, read: Read, *, where: str) -> dict[str, np.ndarray]:
    """Return the arrays that a graph refers to, by name; views of a file's bytes where they lie there as they are.

    Args:
        read: returns the bytes of a file, uint8; called once a file.
        where: for messages.

    Raises:
        BundleError: the graph refers to a file that bundles hold no weights in, or to bytes that are not there.
    """
    files: dict[str, np.ndarray] = {}
    arrays = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            location = next((entry.value for entry in tensor.external_data if entry.key == "location"), None)
            if location is None or not is_weight_file(location):
                why = f"it is in a file '{location}', and a file of weights is called {WEIGHTS}"
                raise BundleError("a weight can't be read", where=f"{where}, {tensor.name}", why=why)
            if location not in files:
                files[location] = read(location)
            arrays[tensor.name] = _view(tensor, files[location], where)
    return arrays


def attach_weights(model: onnx.ModelProto, read: Read, *, where: str) -> ir.Model:
    """Return a graph with the weights that it refers to, copied only out of panels; errors as `external_arrays`."""
    arrays = external_arrays(model, read, where=where)
    for tensor in model.graph.initializer:  # onnx-ir warns of keys that it does not know
        kept = [entry for entry in tensor.external_data if entry.key not in _OWN]
        del tensor.external_data[:]
        tensor.external_data.extend(kept)
    graph = ir.from_proto(model)
    for name, array in arrays.items():
        graph.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return graph


def weights_read(model: onnx.ModelProto) -> int:
    """Return how many bytes of `WEIGHTS` a graph reads, from its start to the end of the last weight."""
    places = [_place(tensor) for tensor in model.graph.initializer if tensor.external_data]
    return max((place.offset + place.length for place in places if place.location == WEIGHTS), default=0)


def panels_of(matrix: np.ndarray, packed: np.ndarray) -> int:
    """Return the panel that a matrix `[K, N]` is packed by (`Place.panel`), 0 if `packed` is something else."""
    if packed.ndim != 3 or packed.dtype != matrix.dtype or packed.shape[1] != len(matrix):
        return 0
    whole = packed.transpose(1, 0, 2).reshape(len(matrix), -1)
    columns = matrix.shape[1]
    same = whole.shape[1] >= columns and np.array_equal(whole[:, :columns], matrix)
    return packed.shape[2] if same and whole.shape[1] - columns < packed.shape[2] else 0


def pitch_of(array: np.ndarray, rows: np.ndarray) -> int:
    """Return the pitch with which an array lies in `rows` (`Place.pitch`), 0 if `rows` is something else."""
    if rows.ndim != 2 or array.ndim < 2 or rows.dtype != array.dtype or len(rows) != len(array):
        return 0
    flat = array.reshape(len(array), -1)
    same = rows.shape[1] >= flat.shape[1] and np.array_equal(rows[:, : flat.shape[1]], flat)
    return rows.shape[1] if same else 0


def share_weights(first: ir.Model, second: ir.Model) -> None:
    """Let the second model hold the first one's arrays where they are equal."""
    known = {_key(v): v.const_value for v in _weights(first)}
    for value in _weights(second):
        value.const_value = known.get(_key(value), value.const_value)


def _key(value: ir.Value) -> tuple[object, ...]:
    assert value.const_value is not None
    array = value.const_value.numpy()
    return array.dtype, array.shape, digest(array)


def _weights(model: ir.Model) -> list[ir.Value]:
    values = model.graph.initializers.values()
    return [v for v in values if v.const_value is not None and v.const_value.nbytes >= SMALLEST]


def digest(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's bytes, of whatever type and shape."""
    return hashlib.sha256(np.ascontiguousarray(array).data.cast("B")).hexdigest()


def _view(tensor: onnx.TensorProto, weights: np.ndarray, where: str) -> np.ndarray:
    shape = tuple(tensor.dims)
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        place = _place(tensor)
    except (KeyError, ValueError) as error:
        raise BundleError("a weight can't be read", where=f"{where}, {tensor.name}", why=str(error)) from error
    offset, length = place.offset, place.length
    if dtype.hasobject or length != _elements(shape, place) * dtype.itemsize:
        how = "".join(f", {key} {value}" for key, value in place.own().items())
        why = f"{length} bytes are no {dtype} of shape {list(shape)}{how}"
    elif offset < 0 or offset % dtype.itemsize or offset + length > weights.size:
        why = f"bytes {offset} to {offset + length} of {weights.size}"
    else:
        try:
            return _taken_apart(weights[offset : offset + length].view(dtype), shape, place)
        except (ValueError, OverflowError) as error:  # an empty one whose other sizes are above all bounds
            why = str(error)
    raise BundleError("a weight can't be read", where=f"{where}, {tensor.name}", why=why)


def _place(tensor: onnx.TensorProto) -> Place:
    """Return what a graph says of a weight's place; ValueError for what is no number."""
    entries: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    panel, turned, pitch, order = (entries.get(key, "") for key in _OWN)
    return Place(
        entries.get("location", ""), int(entries.get("offset", "0")), int(entries.get("length", "-1")),
        int(panel or 0), bool(int(turned or 0)), int(pitch or 0), tuple(map(int, order.split(","))) if order else (),
    )  # fmt: skip


def _elements(shape: tuple[int, ...], place: Place) -> int:
    """Return how many elements an array takes at its place, gaps included; -1 where the place contradicts itself."""
    how = [bool(place.panel), bool(place.pitch), bool(place.order)]
    if min((*shape, place.panel, place.pitch)) < 0 or sum(how) > 1 or (any(how) and not shape):
        return -1
    if place.panel:
        rows, columns = _matrix(shape, place.turned)
        return -(-columns // place.panel) * place.panel * rows
    if place.pitch:
        return shape[0] * place.pitch if place.pitch >= prod(shape[1:]) else -1
    if place.order and sorted(place.order) != list(range(len(shape))):
        return -1
    return prod(shape)


def _taken_apart(found: np.ndarray, shape: tuple[int, ...], place: Place) -> np.ndarray:
    """Return the array that lies in `found`: a view where it lies there as it is."""
    if place.panel:
        rows, columns = _matrix(shape, place.turned)
        whole = found.reshape(-1, rows, place.panel).transpose(1, 0, 2).reshape(rows, -1)[:, :columns]
        return np.ascontiguousarray(whole.T if place.turned else whole).reshape(shape)
    if place.pitch:
        return np.ascontiguousarray(found.reshape(shape[0], place.pitch)[:, : prod(shape[1:])]).reshape(shape)
    if place.order:
        lies = found.reshape([shape[axis] for axis in place.order])
        return np.ascontiguousarray(lies.transpose(np.argsort(place.order)))
    return found.reshape(shape)


def _matrix(shape: tuple[int, ...], turned: bool) -> tuple[int, int]:
    """Return K and N of an array that is a factor of a product, see `Place`."""
    if not shape:
        return 1, 1
    return (prod(shape[1:]), shape[0]) if turned else (prod(shape[:-1]), shape[-1])
