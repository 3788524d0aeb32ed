"""Fold the residual sum into the gated convolution before it.

    relu(identity + S * conv)  =  relu(identity) with its active tiles replaced by relu(conv + identity)

so only active tiles of the identity are read and written. Where the identity is known not to be negative
(it left a ReLU), relu(identity) is the identity itself.
"""

from __future__ import annotations

import onnx_ir as ir

from dvexport.dialect.facts import is_nonnegative
from dvexport.dialect.spec import operator_of, specification
from dvexport.graph.graph import DV, Builder, replace_node
from dvexport.graph.match import attributes_of, is_op, made_by, only_user

__all__ = ["FuseResidual"]


class FuseResidual(ir.passes.InPlacePass):
    """Match Relu(Add(identity, SparseConv)) where the convolution has no other user.

    Requires: `split_paths` has run. Ensures: a matched sum is the `residual` of its convolution.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every match."""
        modified = False
        for node in list(model.graph):
            found = _match(node)
            if found is not None:
                _rewrite(*found)
                modified = True
        return ir.passes.PassResult(model, modified)


def _match(relu: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node, ir.Value] | None:
    add = made_by(relu.inputs[0], "Add") if is_op(relu, "Relu") else None
    if add is None or only_user(add.outputs[0]) is None:
        return None
    for index in range(2):
        conv_value, identity = add.inputs[index], add.inputs[1 - index]
        assert conv_value is not None and identity is not None
        conv = conv_value.producer()
        same = conv_value.shape == identity.shape  # a broadcast sum is no residual
        if conv is not None and same and only_user(conv_value) is not None and _is_plain(conv):
            return conv, add, relu, identity
    return None


def _is_plain(node: ir.Node) -> bool:
    """A SparseConv over tiles that adds to zeros and applies no activation of its own."""
    operator = operator_of(node)
    if operator is None or operator.name != "SparseConv":
        return False
    inputs = operator.bind(node)
    given = {name for name, value in inputs.items() if value is not None}
    return not given & {"rows", "residual", "base"} and operator.attributes_of(node)["activation"] == "none"


def _rewrite(conv: ir.Node, add: ir.Node, relu: ir.Node, identity: ir.Value) -> None:
    operator = specification(conv)
    inputs = operator.bind(conv)
    build = Builder(metadata=conv.metadata_props)
    base = None
    if inputs["tiles"] is not None:
        base = identity if is_nonnegative(identity) else build.op("Relu", identity)
        base.shape, base.type = identity.shape, identity.type
    attributes = attributes_of(conv)
    attributes["activation"] = "relu"
    fused = build.op(
        "SparseConv", inputs["X"], inputs["W"], inputs["B"], None, inputs["tiles"], inputs["active_in"],
        identity, base, domain=DV, **attributes,
    )  # fmt: skip
    replace_node(relu, build, [fused])
    assert add.graph is not None
    add.graph.remove([add, conv], safe=True)
