"""Units of convolutions: plain ones of images, and those that a gate governs, with what is fused into them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dvexport.dialect.spec import specification
from dvexport.graph.graph import array_of
from dvexport.graph.match import is_op, made_by, only_user, other_input
from dvexport.targets.tvm.kernels.plane import MOST_STEP
from dvexport.targets.tvm.units.kinds import Family, Image, Role
from dvexport.targets.tvm.units.planes import IMAGE_RANK
from dvexport.targets.tvm.units.unit import Unit

__all__ = ["FAMILY", "ConvUnit"]

FAMILY = Family()


@dataclass(kw_only=True)
class ConvUnit(Unit):
    """A convolution with what is fused into it: act(conv(x) + bias + residual), written over `base`.

    Attributes:
        x: the image `[N, Cin, H, W]`.
        weight: `[Cout, Cin, kh, kw]`.
        bias: `[Cout]`.
        strides, dilations: down and across.
        pads: top, left, bottom, right.
        relu: whether the activation is a ReLU; otherwise there is none.
        rows, cols: masks of the output and input channels that are active; None: all.
        tiles: mask of the active cells; None: the whole plane.
        residual: added to the sum.
        base: what lies where nothing is computed.
    """

    x: ir.Value
    weight: np.ndarray
    bias: np.ndarray
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, ...] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    relu: bool = False
    rows: ir.Value | None = None
    cols: ir.Value | None = None
    tiles: ir.Value | None = None
    residual: ir.Value | None = None
    base: ir.Value | None = None

    def reads_padding_of(self, value: ir.Value) -> bool:
        """Tell whether this convolution needs the padding of an image to be zero.

        A convolution that stays inside the image reads no padding. What is added to its sums needs none either:
        the kernel writes none of what it finds there.
        """
        return self.base is value or (self.x is value and any(self.pads))


@FAMILY.kind("conv", ops=("Conv", "dv.SparseConv"), role=Role.COMPUTE, planar=True, image=Image.MAKES)
def _match(node: ir.Node, images: Collection[ir.Value]) -> ConvUnit | None:
    return _plain(node, images) if is_op(node, "Conv") else _sparse(node)


def _sparse(node: ir.Node) -> ConvUnit:
    operator = specification(node)
    inputs, attributes = operator.bind(node), operator.attributes_of(node)
    weight = array_of(inputs["W"])
    assert weight is not None and inputs["X"] is not None
    return ConvUnit(
        kind="conv", nodes=[node], x=inputs["X"], weight=weight, bias=_bias(inputs["B"], len(weight)),
        strides=tuple(attributes["strides"]), pads=tuple(attributes["pads"]), dilations=tuple(attributes["dilations"]),
        relu=attributes["activation"] == "relu", rows=inputs["rows"], cols=inputs["active_in"],
        tiles=inputs["tiles"], residual=inputs["residual"], base=inputs["base"],
    )  # fmt: skip


def _plain(node: ir.Node, images: Collection[ir.Value]) -> ConvUnit | None:
    weight, x = array_of(node.inputs[1]), node.inputs[0]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if weight is None or weight.ndim != IMAGE_RANK or x is None or x not in images:
        return None
    if not _has_kernel(node) or (bias is not None and array_of(bias) is None):
        return None
    given = node.attributes
    unit = ConvUnit(
        kind="conv", nodes=[node], x=x, weight=weight, bias=_bias(bias, len(weight)),
        strides=_pair(given.get_ints("strides", [1, 1])), pads=tuple(given.get_ints("pads", [0, 0, 0, 0])),
        dilations=_pair(given.get_ints("dilations", [1, 1])),
    )  # fmt: skip
    _fuse(unit, images)
    return unit


def _has_kernel(node: ir.Node) -> bool:
    """Tell whether the attributes of a convolution are such that there is a kernel for it."""
    given = node.attributes
    padded = given.get_string("auto_pad", "NOTSET") == "NOTSET"
    return padded and given.get_int("group", 1) == 1 and given.get_ints("strides", [1])[-1] <= MOST_STEP


def _fuse(unit: ConvUnit, images: Collection[ir.Value]) -> None:
    """Fuse a Relu, or an Add and its Relu, if nothing else reads the values between."""
    after = _fuse_copies(unit)
    if after is not None and is_op(after, "Relu"):
        unit.relu = True
        unit.nodes.append(after)
        _fuse_copies(unit)
    elif after is not None and is_op(after, "Add"):
        other = other_input(after, unit.last.outputs[0])
        relu = only_user(after.outputs[0])
        same = other is not None and other in images and other.shape == after.outputs[0].shape
        if same and relu is not None and is_op(relu, "Relu") and _comes_last(unit.nodes[0], other):
            unit.residual, unit.relu = other, True
            unit.nodes += [after, relu]


def _fuse_copies(unit: ConvUnit) -> ir.Node | None:
    """Fuse what only renames the result; return the only user after that."""
    after = only_user(unit.last.outputs[0])
    while after is not None and is_op(after, "Identity"):
        unit.nodes.append(after)
        after = only_user(after.outputs[0])
    return after


def _comes_last(conv: ir.Node, other: ir.Value | None) -> bool:
    """Tell whether a convolution is the one to fuse a sum: the later one, where two convolutions are summed."""
    assert conv.graph is not None and other is not None
    private = only_user(other) is not None
    while (copy := made_by(other, "Identity")) is not None:
        other = copy.inputs[0]
        assert other is not None
        private = private and only_user(other) is not None
    rival = made_by(other, "Conv")
    if rival is None or not private:
        return True
    order = {node: i for i, node in enumerate(conv.graph)}
    return order[rival] < order[conv]


def _bias(value: ir.Value | None, count: int) -> np.ndarray:
    array = array_of(value)
    return np.zeros(count, np.float32) if array is None else array


def _pair(values: Collection[int]) -> tuple[int, int]:
    first, second = values
    return first, second
