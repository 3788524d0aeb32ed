"""Pooling and mask convolutions on rows: what is only updated is not pooled again."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import check, data, graph, infer, ops, run, weights

from dvexport.passes.tiles.keep_rows import KeepRows
from dvexport.passes.tiles.lower_tiles import LowerTiles

FRAMES = 2


def pooled(lowering, pool, tiles="2,2", body=""):
    """A SparseConv on tiles of an 8 x 8 plane of rows, pooled; compare, and return the operators."""
    model = graph(
        f"""g (float[{FRAMES},16,8,8] x, float[16,16,3,3] W, bool[{FRAMES},{tiles}] tiles) => (float[n,c,h,w] y)
        {{ v = dv.SparseConv<gate="g", pads=[1,1,1,1]>(x, W, , , tiles, , , x) {body} y = AveragePool<{pool}>(v) }}""",
        W=weights(16, 16, 3),
    )  # fmt: skip
    before = model.clone()
    (node,) = (node for node in model.graph if node.op_type == "SparseConv")
    node.metadata_props["dv.lowering"] = lowering
    LowerTiles()(model)
    infer(model)
    KeepRows()(model)
    check(model)
    rng = np.random.default_rng(0)
    for share in (0.0, 0.5, 1.0):
        mask = rng.random((FRAMES, *map(int, tiles.split(",")))) < share
        feeds = {"x": data(FRAMES, 16, 8, 8), "tiles": mask}
        np.testing.assert_allclose(run(model, **feeds)["y"], run(before, **feeds)["y"], rtol=0, atol=1e-5)
    return ops(model)


@pytest.mark.parametrize("lowering", ["tiles", "winograd2", "winograd4"])
def test_an_update_is_pooled_alone(lowering):
    names = pooled(lowering, "kernel_shape=[4,4], strides=[4,4]")
    assert names.count("ScatterND") == 2  # the convolution's, and that of its means into those of the base
    assert names.count("ReduceMean") == 2


@pytest.mark.parametrize(
    ("pool", "tiles"),
    [
        ("kernel_shape=[2,2], strides=[2,2]", "2,2"),  # cells finer than tiles
        ("kernel_shape=[4,4], strides=[2,2]", "2,2"),  # cells that overlap
        ("kernel_shape=[4,4], strides=[4,4]", "3,3"),  # tiles that don't divide the plane
    ],
)
def test_another_grid_is_pooled_whole(pool, tiles):
    names = pooled("tiles", pool, tiles)
    assert names.count("ScatterND") == 1
    assert names.count("ReduceMean") == 1


def mask_conv(weight, frames=FRAMES, attributes="pads=[1,1,1,1]", bias=", b"):
    """A convolution that reads rows; compare, and return the operators."""
    model = graph(
        f"""g (float[{frames},4,6,8] x, float[{",".join(map(str, weight.shape))}] W, float[{len(weight)}] b)
            => (float[n,c,h,w] y)
        {{ r = dv.ToRows(x) p = dv.FromRows<size=[6,8]>(r) y = Conv<{attributes}>(p, W{bias}) }}""",
        W=weight, b=data(len(weight)),
    )  # fmt: skip
    feeds = {"x": data(frames, 4, 6, 8)}
    expected = run(model, **feeds)["y"]
    model.graph.outputs[0].shape = ir.Shape(expected.shape)
    KeepRows()(model)
    check(model)
    np.testing.assert_allclose(run(model, **feeds)["y"], expected, rtol=0, atol=1e-5)
    return ops(model)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize(
    "attributes", ["pads=[1,1,1,1]", "pads=[0,0,0,0]", "pads=[2,1,0,1], strides=[2,1]", "dilations=[2,2]"]
)
def test_one_channel_is_a_product_and_sums(frames, attributes):
    names = mask_conv(weights(1, 4, 3), frames, attributes)
    product = ["MatMul", "Reshape", "Gather", "ReduceSum", "Add", "Reshape"]
    assert names == ["dv.ToRows", "dv.FromRows", *product]  # the plane that was there, for nobody


def test_without_bias():
    assert "Add" not in mask_conv(weights(1, 4, 3), bias="")


@pytest.mark.parametrize(
    ("weight", "attributes"), [(weights(2, 4, 3), "pads=[1,1,1,1]"), (weights(1, 4, 3), 'auto_pad="SAME_UPPER"')]
)
def test_other_convolutions_stay(weight, attributes):
    assert "Conv" in mask_conv(weight, attributes=attributes)
