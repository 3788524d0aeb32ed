"""Graphs of bundles with their weights inside, for tests that change one or load it alone."""

from __future__ import annotations

from onnx import numpy_helper

from dvexport.bundle.archive import Bundle
from dvexport.bundle.graphs import read_graph
from dvexport.graph.weights import external_arrays

__all__ = ["inlined"]


def inlined(bundle: Bundle, name: str = "model.onnx") -> bytes:
    """Return a graph of a bundle that refers to no other file."""
    model = read_graph(bundle, name)
    arrays = external_arrays(model, bundle.array, where=name)
    for tensor in model.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
    return model.SerializeToString()
