"""Inputs and outputs of the C runtime by their names."""

from __future__ import annotations

import ctypes

import onnx_ir as ir
import pytest
from runtime_plans import sample_network, sample_plan

from dvexport.errors import UsageError
from dvexport.targets import catalogue
from dvexport.targets.tvm.artifact import build_artifact
from dvexport.targets.tvm.machine.machine import machine_for
from dvexport.targets.tvm.session import NativeSession


@pytest.mark.parametrize("kind", ["input", "output"])
def test_a_port_is_found_by_its_name(kind):
    net = sample_network()
    names = [port.name for port in getattr(sample_plan(), f"{kind}s")]
    others = [port.name for port in getattr(sample_plan(), "outputs" if kind == "input" else "inputs")]
    with NativeSession(net.library, net.plan, net.weights) as session:
        find = getattr(session._library, f"dvx_{kind}_index")
        find.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        assert [find(session._net, name.encode()) for name in names] == list(range(len(names)))
        assert [find(session._net, name) for name in (b"nothing", b"", None, *map(str.encode, others))] == [-1] * (
            3 + len(others)
        )


def test_more_axes_than_a_port_has_room_for_are_refused_before_anything_is_compiled():
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["": 20]>
        g (float[1,3,4,4] frames) => (float[1,2,2,2,2,1,3] y) {
            s = Constant<value_ints=[1,2,2,2,2,1,3]>() y = Reshape(frames, s) }""")
    with pytest.raises(UsageError, match="up to 6 axes") as caught:
        build_artifact({"gated": model}, machine_for(catalogue.load("x86-64-avx512")), lambda _: None)
    assert caught.value.where == "y"
