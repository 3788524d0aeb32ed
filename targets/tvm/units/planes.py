"""Which values are images, and which of these are held as planes.

An *image* is a value that kernels over planes may read: it has an image's shape and type, and it comes from the host or
from such kernels. Images are known before the graph is cut, since a unit of planes may only read images. Which images
are *held* as planes follows from the units: a mean over cells, for example, is an image that is held flat. A value that
is wanted in the other form is converted once (`calls/values.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import onnx_ir as ir

from dvexport.graph.graph import array_of
from dvexport.targets.tvm.units.kinds import Image, Kind
from dvexport.targets.tvm.units.unit import Unit

__all__ = ["IMAGE_RANK", "held_as_planes", "images_of", "is_image"]

IMAGE_RANK = 4
"""Axes of an image: frames, channels, height, width."""


def is_image(value: ir.Value) -> bool:
    """Tell whether a value has an image's shape and type."""
    return value.shape is not None and len(value.shape) == IMAGE_RANK and value.dtype == ir.DataType.FLOAT


def images_of(model: ir.Model, kinds: Collection[Kind]) -> set[ir.Value]:
    """Return the images of a model.

    Args:
        model: to be cut.
        kinds: whose `image` tells what nodes do.
    """
    images = {value for value in model.graph.inputs if is_image(value)}
    for node in model.graph:
        if _makes_images(node, kinds, images):
            images.update(v for v in node.outputs if is_image(v))
    return images


def _makes_images(node: ir.Node, kinds: Collection[Kind], images: Collection[ir.Value]) -> bool:
    told = {kind.image for kind in kinds if kind.starts_at(node)}
    inputs = [v for v in node.inputs if v is not None and array_of(v) is None]
    return Image.MAKES in told or (Image.KEEPS in told and bool(inputs) and all(v in images for v in inputs))


def held_as_planes(units: Iterable[Unit], kinds: Mapping[str, Kind]) -> set[ir.Value]:
    """Return the values that units make as planes; a copy is held as what it copies."""
    held: set[ir.Value] = set()
    for unit in units:
        if kinds[unit.kind].planar or (unit.kind == "copy" and unit.inputs[0] in held):
            held.update(unit.outputs)
    return held
