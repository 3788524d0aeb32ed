"""Calls of a convolution: its lists, its memory, and the kernels that can do it.

What a gate decides becomes three lists: output channels, input channels, and runs of pixels (for Winograd, tiles). The
same list is made once, however many convolutions read it. Which kernels fit is said in `conv_options.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dvexport.graph.graph import static_shape
from dvexport.targets.tvm.calls import costs
from dvexport.targets.tvm.calls.call_list import Alternative
from dvexport.targets.tvm.calls.conv_options import ConvLayer, Option, options_of
from dvexport.targets.tvm.calls.decisions import channel_list, run_list
from dvexport.targets.tvm.calls.draft import Draft
from dvexport.targets.tvm.calls.memory import Part, scratch
from dvexport.targets.tvm.calls.writers import Writers, label_of
from dvexport.targets.tvm.kernels.conv import direct_data
from dvexport.targets.tvm.kernels.conv.direct_data import Window
from dvexport.targets.tvm.units.convolutions import ConvUnit

__all__ = ["WRITERS"]

WRITERS = Writers()

_T = TypeVar("_T")
_Fixed = tuple[int | None, int | None, int | None]


@WRITERS.writes("conv", ConvUnit)
def _write(draft: Draft, unit: ConvUnit) -> None:
    """Write the calls of a convolution, one for each frame."""
    frames, layer = static_shape(unit.output)[0], _layer(draft, unit)
    x = draft.planes(unit.x)
    residual = None if unit.residual is None else draft.planes(unit.residual)
    target = _target(draft, unit, layer)
    for index in range(frames):
        images = {"X": x.frame(frames, index), "Y": target.frame(frames, index)}
        if residual is not None:
            images["R"] = residual.frame(frames, index)
        _Frame(draft, unit, layer, index, images).write()


def _layer(draft: Draft, unit: ConvUnit) -> ConvLayer:
    cout, cin, *kernel = unit.weight.shape
    window = Window((kernel[0], kernel[1]), unit.strides, (unit.pads[0], unit.pads[1]), unit.dilations)
    grid = None
    if unit.tiles is not None:
        _, rows, columns = static_shape(unit.tiles)
        grid = rows, columns
    x, y = draft.values.layout(unit.x), draft.values.layout(unit.output)
    return ConvLayer(x, y, window, (cin, cout), grid, unit.residual is not None, unit.relu)


def _target(draft: Draft, unit: ConvUnit, layer: ConvLayer) -> Part:
    """Return the memory of the output, what is not computed already in it."""
    if unit.rows is None and unit.tiles is None:
        covered = layer.runs(draft.machine).inside and not layer.may_be_winograd(draft.machine, draft.algorithms)
        partial = not draft.values.reads_padding(unit.output)
        return draft.new_planes(unit.output, fragile=True, covered=covered, partial=partial)
    if unit.base is None:
        target = draft.new_planes(unit.output)
        draft.calls.clear(target, f"{unit.output.name}", unit.gate)
        return target
    base = draft.planes(unit.base)
    if draft.values.may_overwrite(unit.base, unit) and unit.residual is not unit.base:
        draft.take_over(unit.output, unit.base)
        return draft.planes(unit.output)
    target = draft.new_planes(unit.output)
    draft.calls.copy(base, target, f"{unit.base.name} to {unit.output.name}", unit.gate)
    return target


@dataclass(frozen=True)
class _Frame:
    """One frame of a convolution.

    Attributes:
        images: the frame's X and Y, and R where something is added.
    """

    draft: Draft
    unit: ConvUnit
    layer: ConvLayer
    index: int
    images: dict[str, Part]

    def write(self) -> None:
        """Write its call, with every kernel that can do it; without a decision the cheapest one alone."""
        draft, unit, (cin, cout) = self.draft, self.unit, self.layer.channels
        rows = channel_list(draft, unit.rows, cout, self.index)
        cols = channel_list(draft, unit.cols, cin, self.index)
        found = options_of(self.layer, draft.machine, draft.algorithms)
        options = [(option, self._pixels(option)) for option in found]
        first, pixels = options[0]
        decided = unit.rows is not None, unit.cols is not None, unit.tiles is not None
        if not any(decided):
            options = [min(options, key=lambda each: costs.evaluate(each[0].cost, cout, cin, first.vectors))]
        working = scratch(
            max(option.scratch(draft.machine, draft.threads) for option, _ in options)
        )  # one of them runs
        known = {**self.images, "rows": rows, "cols": cols, "scratch": working}
        counts = _where(decided, (rows, cols, pixels))
        fixed = _where([not each for each in decided], (cout, cin, first.vectors))
        alternatives = [self._alternative(option, {**known, "pixels": own}, fixed) for option, own in options]
        draft.calls.choose(alternatives, label_of(unit, unit.output), unit.gate, counts)

    def _pixels(self, option: Option) -> Part:
        """Return the list of the runs of the frame's active tiles; of all where none are told apart."""
        tiles = self.unit.tiles
        if tiles is None or option.only:
            every = np.ones(len(option.runs.starts) - 1, bool)
            return self.draft.constants.add(direct_data.run_list(option.runs, every, self.draft.machine))
        return run_list(self.draft, tiles, self.index, option.runs.table(), option.runs.run)

    def _alternative(self, option: Option, known: dict[str, Part], fixed: _Fixed) -> Alternative:
        """Return an option's call; counts that no gate decides are folded into its cost model."""
        constants, machine = self.draft.constants, self.draft.machine
        weights = option.weights(self.unit.weight, constants)
        parts = {
            **known, "runs": known["pixels"], "tiles": known["pixels"], "W": weights, "U": weights,
            "B": constants.add(self.unit.bias.astype(np.float32)), "inside": constants.add(self.layer.y.inside()),
            "shape": constants.add(option.shape(machine)),
        }  # fmt: skip
        kernel = option.kernel(machine)
        arguments = tuple(parts[name] for name in kernel.buffers)
        return Alternative(kernel, arguments, costs.fixed(option.cost, *fixed), option.only)


def _where(told: Sequence[bool], values: tuple[_T, _T, _T]) -> tuple[_T | None, _T | None, _T | None]:
    """Return the values that are told, None for the others."""
    rows, columns, pixels = (value if each else None for each, value in zip(told, values, strict=True))
    return rows, columns, pixels
