"""Element types and spatial axes as data: names, sizes, and what is refused. Nothing is compiled here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plane_kernels import machine
from winograd_weights import winograd_weights

from dvexport.errors import UsageError
from dvexport.targets.tvm.kernels import lists
from dvexport.targets.tvm.kernels.conv import winograd_lists
from dvexport.targets.tvm.kernels.conv.direct import DirectConv, direct_conv
from dvexport.targets.tvm.kernels.conv.direct_data import Window, direct_weights
from dvexport.targets.tvm.kernels.conv.winograd import WinogradConv, spec_for, winograd_conv
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.kernels.planes import elementwise, planes, pooling
from dvexport.targets.tvm.kernels.tokens import tokens
from dvexport.targets.tvm.kernels.tokens.attention import Attention, attention
from dvexport.targets.tvm.kernels.tokens.dense import Dense, dense
from dvexport.targets.tvm.kernels.tokens.matmul import MatMul, matmul
from dvexport.targets.tvm.kernels.tokens.window_attention import window_attention
from dvexport.targets.tvm.machine.dtype import F16, F32, S8, S32, dtype_of

SPECS = [
    (DirectConv(9, 1, 8, False, False, False, packed=False, block=(4, 3)), direct_conv),
    (WinogradConv(4, False, False, True, (8, 6)), winograd_conv),
    (Dense(2), dense),
    (MatMul(), matmul),
    (Attention(1), attention),
    (Attention(1, softmax=False), attention),
    (Attention(1), window_attention),
]
PLAIN = [
    elementwise.copy, elementwise.clear, elementwise.relu, elementwise.add, planes.load_frame, planes.store_planes,
    planes.zero_pads, planes.zero_ends, planes.merge, planes.merge_history, planes.merge_lines, pooling.cell_mean,
    pooling.global_mean, tokens.layer_norm, tokens.select_tokens, lists.mask_from_tiles,
]  # fmt: skip


def name_of(spec) -> str:
    given = {DirectConv: 8, WinogradConv: machine(8)}.get(type(spec))
    return spec.name if given is None else spec.name(given)


@pytest.mark.parametrize(("spec", "generator"), SPECS)
def test_a_kernels_name_begins_with_its_element_type(spec, generator):
    kernel = generator(spec, machine(8))
    assert name_of(spec).startswith("f32_") and kernel.name.startswith("f32_")
    assert name_of(replace(spec, dtype=S8)) == "s8_" + name_of(spec).removeprefix("f32_")
    stated = dict(kernel.contract.buffers)
    assert (stated["Y"].dtype, stated["shape"].dtype) == (F32, S32)


@pytest.mark.parametrize(("spec", "generator"), SPECS)
def test_a_spec_of_another_element_type_is_refused(spec, generator):
    with pytest.raises(UsageError, match="computes in f16") as caught:
        generator(replace(spec, dtype=F16), machine(8))
    assert "writes code for f32" in str(caught.value) and "docs/native.md" in str(caught.value)


@pytest.mark.parametrize("generator", PLAIN)
def test_kernels_without_a_spec_take_an_element_type_too(generator):
    assert generator(machine(8)).name == f"f32_{generator.__name__}"
    with pytest.raises(UsageError, match="computes in f16"):
        generator(machine(8), F16)


def test_an_unknown_element_type_is_refused():
    assert dtype_of(np.dtype(np.float16)) == F16
    with pytest.raises(UsageError, match="no buffers of complex64"):
        dtype_of("complex64")


@pytest.mark.parametrize("shape", [(56, 56), (13, 17), (4, 9, 7)])
@pytest.mark.parametrize("dtype", [F16, S8])
def test_a_plane_of_small_elements_takes_fewer_bytes(shape, dtype):
    """The pixels lie as far apart in elements; what is rounded up are cache lines."""
    wide, narrow = Plane(shape), Plane(shape, dtype=dtype)
    assert narrow.strides == wide.strides
    assert narrow.bytes % 64 == dtype.size(narrow.base) % 64 == 0
    share = wide.bytes * dtype.bytes // F32.bytes
    assert share <= narrow.bytes <= share + 4 * 64
    assert narrow.inside().dtype == dtype.array and narrow.inside().sum() == np.prod(shape)


def test_weights_take_the_type_of_their_kernel():
    weights = np.ones((2, 3, 3, 3), np.float32)
    assert direct_weights(weights, F16).dtype == winograd_weights(weights, 4, F16).dtype == np.float16
    assert direct_weights(weights, F16).shape == (2, 64)  # 27 weights, and a cache line of 32 between rows


def test_planes_of_three_axes_share_the_padding_of_slices_as_of_rows():
    plane = Plane((3, 5, 6), 1)
    assert plane.strides == (64, 8, 1)  # rows of 6 + 1, slices of 5 + 1 rows, rounded up to tiles of 4
    assert plane.base == 80  # a slice, a row and a pixel of padding, in cache lines
    image = np.arange(1, 91, dtype=np.float32).reshape(3, 5, 6)
    packed = plane.pack(image)
    np.testing.assert_array_equal(plane.unpack(packed), image)
    for z, y, x in np.ndindex(5, 7, 8):
        inside = 0 < z < 4 and 0 < y < 6 and 0 < x < 7
        assert packed[plane.offset(z - 1, y - 1, x - 1)] == (image[z - 1, y - 1, x - 1] if inside else 0)


def test_an_image_of_two_axes_lies_as_one_slice():
    flat, deep = Plane((5, 6)), Plane((1, 5, 6))
    assert deep.strides[1:] == flat.strides
    assert flat.taps((3, 3)) == deep.taps((1, 3, 3)) == [y * flat.pitch + x for y in range(3) for x in range(3)]


def test_a_window_fills_in_what_it_is_not_told():
    assert Window((3, 3, 3)) == Window((3, 3, 3), (1, 1, 1), (0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match="strides"):
        Window((3, 3, 3), (1, 1))
    with pytest.raises(ValueError, match="spatial axes"):
        Window((3, 3), pads=(1, 1)).check(Plane((4, 4, 4)), Plane((4, 4, 4)))


@pytest.mark.parametrize("make", [
    lambda plane: spec_for(plane, plane, None, machine(8), residual=False, relu=False),
    lambda plane: winograd_lists.winograd_shape(4, plane, plane, 3, 100),
    lambda plane: pooling.pool_shape(3, plane, plane, (1, 1)),
    lambda plane: pooling.cell_mean_shape(3, plane, (2, 2)),
    lambda plane: planes.frame_shape(3, plane),
    lambda plane: lists.mask_shape(plane, (2, 2)),
    lambda plane: lists.line_table(plane, (2, 2), 1),
])  # fmt: skip
def test_kernels_over_rows_and_columns_refuse_a_third_axis(make):
    with pytest.raises(UsageError, match="takes two spatial axes, not 3"):
        make(Plane((4, 8, 8)))
