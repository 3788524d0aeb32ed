"""Calls of merges: what a gate computed, joined with what it reuses."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from dvexport.dialect.spec import specification
from dvexport.graph.graph import DV, static_shape
from dvexport.graph.match import is_op
from dvexport.targets.tvm.calls.decisions import channel_list, line_list, lines_suffice, not_skipped, pixel_mask
from dvexport.targets.tvm.calls.draft import Draft
from dvexport.targets.tvm.calls.memory import Part
from dvexport.targets.tvm.calls.writers import Writers, label_of
from dvexport.targets.tvm.kernels.abi import Kernel
from dvexport.targets.tvm.kernels.conv.direct_data import Window
from dvexport.targets.tvm.kernels.plane import Plane
from dvexport.targets.tvm.kernels.planes import planes
from dvexport.targets.tvm.units.unit import Unit

__all__ = ["WRITERS"]

WRITERS = Writers()


@WRITERS.writes("merge", Unit)
def _merge(draft: Draft, unit: Unit) -> None:
    inputs = specification(unit.nodes[0]).bind(unit.nodes[0])
    v = inputs["V"]
    assert v is not None
    if inputs["tiles"] is None and inputs["H"] is v and _reads_listed(unit.output):
        draft.share(unit.output, draft.planes(v))  # its readers leave out what was skipped
        return
    source, target = draft.planes(v), draft.new_planes(unit.output, partial=True)
    if not _reads_listed(unit.output):
        draft.calls.clear(target, str(unit.output.name), unit.gate)
    shape = draft.constants.add(planes.merge_shape(draft.values.layout(v)))
    frames = static_shape(v)[0]
    for index in range(frames):
        kernel, lists = _kernel(draft, unit, inputs, index)
        arguments = [source.frame(frames, index), *lists, shape, target.frame(frames, index)]
        draft.calls.call(kernel, arguments, label_of(unit), unit.gate)


def _kernel(
    draft: Draft, unit: Unit, inputs: Mapping[str, ir.Value | None], index: int
) -> tuple[Kernel, list[Part]]:  # fmt: skip
    """Return the kernel that merges a frame, and its arguments between V and the shape."""
    v, history, action, tiles = inputs["V"], inputs["H"], inputs["action"], inputs["tiles"]
    assert v is not None
    frames, channels, _, _ = static_shape(v)
    plane, machine = draft.values.layout(v), draft.machine
    rows = channel_list(draft, None, channels, index) if action is None else not_skipped(draft, action, index)
    mask = draft.constants.add(plane.inside()) if tiles is None else pixel_mask(draft, tiles, index, plane)
    if history is not None and history is not v:
        assert action is not None
        old, chosen = (part.frame(frames, index) for part in (draft.planes(history), draft.flat(action)))
        return planes.merge_history(machine), [old, mask, chosen, rows]
    if tiles is not None and _reads_tiles(unit.output, tiles, plane):
        return planes.merge_lines(machine), [mask, rows, line_list(draft, tiles, index, plane)]
    return planes.merge(machine), [mask, rows]


def _reads_listed(value: ir.Value) -> bool:
    """Tell whether all who read a merge leave out the channels that were skipped."""
    return all(_conv_input(user, "active_in") is not None for user, _ in value.uses()) and not value.is_graph_output()


def _reads_tiles(value: ir.Value, tiles: ir.Value, plane: Plane) -> bool:
    """Tell whether all who read a merge are convolutions that need only the lines around its active tiles."""
    return not value.is_graph_output() and all(
        _conv_input(user, "tiles") is tiles and lines_suffice(tiles, plane, _window(user), _size(user.outputs[0]))
        for user, _ in value.uses()
    )


def _size(image: ir.Value) -> tuple[int, int]:
    _, _, height, width = static_shape(image)
    return height, width


def _window(node: ir.Node) -> Window:
    """Return the window of a convolution of the dialect."""
    operator = specification(node)
    given, weight = operator.attributes_of(node), operator.bind(node)["W"]
    assert weight is not None
    _, _, height, width = static_shape(weight)
    return Window((height, width), tuple(given["strides"]), tuple(given["pads"][:2]), tuple(given["dilations"]))


def _conv_input(node: ir.Node, name: str) -> ir.Value | None:
    return specification(node).bind(node)[name] if is_op(node, "SparseConv", domain=DV) else None
