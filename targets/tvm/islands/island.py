"""Kernels for everything that has none of its own: policies, masks and odd operators between convolutions.

An *island* is a set of ONNX nodes that read nothing but constants and given values. Its operators become loop
nests through TVM's Relax (`relax.py`), the nests are fused (`fuse.py`) and written as vector code
(`loops.py`). Small nests share a kernel, as a call costs more than they do; large ones have their own, split
between threads.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx_ir as ir

from dvexport.errors import UsageError
from dvexport.graph.graph import array_of
from dvexport.targets.tvm.islands.expr import axis, load
from dvexport.targets.tvm.islands.fuse import fuse
from dvexport.targets.tvm.islands.loops import write_nest
from dvexport.targets.tvm.islands.nest import nests
from dvexport.targets.tvm.islands.relax import Program, canonical_model, lower, refuse, unknown_operators
from dvexport.targets.tvm.islands.stages import Stage, Tensor, read_stages
from dvexport.targets.tvm.kernels.abi import Kernel, write_kernel, write_serial_kernel
from dvexport.targets.tvm.kernels.bounds import reads, writes
from dvexport.targets.tvm.machine.machine import Machine

__all__ = ["Island", "compile_island"]

_WORTH_THREADS = 1 << 16
"""Operations from which a stage has a kernel of its own, which several threads may share."""


@dataclass
class Island:
    """What an island of nodes has become.

    Attributes:
        calls: kernels in the order of execution, each with the names of its buffers' tensors.
        buffers: element type and shape of temporaries by name.
        constants: arrays by name.
        aliases: outputs that are an input under another name: output -> input.
    """

    calls: list[tuple[Kernel, tuple[str, ...]]] = field(default_factory=list)
    buffers: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


def compile_island(
    nodes: Sequence[ir.Node], inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], machine: Machine
) -> Island:
    """Return kernels for some nodes of a graph.

    Args:
        nodes: in an order in which they can run; they read `inputs`, constants and each other.
        inputs: values from outside, of static shape.
        outputs: values that others read.
        machine: what to generate code for.

    Raises:
        UsageError: an operator that no kernel can be made for; names the node and the module it came from.
    """
    for node in unknown_operators(nodes):
        raise refuse(node, "TVM's importer does not know it")
    model, large = canonical_model(nodes, inputs, outputs)
    try:
        template = _template(model, machine)
    except UsageError as error:
        raise _culprit(nodes, error) from error
    names = {f"x{i}": str(value.name) for i, value in enumerate(inputs)}
    names.update({f"y{i}": str(value.name) for i, value in enumerate(outputs)})
    return _named(template, names, large)


def _culprit(nodes: Sequence[ir.Node], error: UsageError) -> UsageError:
    """Return the error for the first node that can't be converted alone."""
    for node in nodes:
        outside = [value for value in dict.fromkeys(node.inputs) if value is not None and array_of(value) is None]
        try:
            _loops(canonical_model([node], outside, node.outputs)[0])
        except UsageError as reason:
            return refuse(node, reason.why or reason.what)
    return refuse(nodes[-1], error.why or error.what)


def _loops(model: bytes) -> tuple[Program, list[Stage], dict[str, Tensor]]:
    """Return a model's program and what its calls consist of."""
    try:
        program = lower(model)
        return (program, *read_stages(program))
    except UsageError:
        raise
    except Exception as error:  # TVM's errors share no base but this
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError("TVM can't convert a part of the model", why=lines[-1]) from error


def _named(template: Island, names: dict[str, str], large: dict[str, np.ndarray]) -> Island:
    """Return an island made for equal nodes under the names of these; temporaries are named after the first output."""
    prefix = names["y0"]

    def name(tensor: str) -> str:
        return names.get(tensor) or f"{prefix}/{tensor}"

    return Island(
        [(kernel, tuple(map(name, tensors))) for kernel, tensors in template.calls],
        {name(tensor): what for tensor, what in template.buffers.items()},
        {name(tensor): large.get(tensor, array) for tensor, array in template.constants.items()},
        {name(alias): name(tensor) for alias, tensor in template.aliases.items()},
    )


@functools.lru_cache(maxsize=256)
def _template(model: bytes, machine: Machine) -> Island:
    """Return the island of a canonical model; large constants are empty arrays, filled in by name."""
    program, stages, tensors = _loops(model)
    wanted = {f"y{i}": name for i, name in enumerate(program.outputs)}
    stages += [_copy(name, source, tensors) for name, source in wanted.items()]
    given = {name for name in tensors if name[0] in "xw" and name[1:].isdigit()}
    fused = fuse(stages, tensors, {name for name in given if name[0] == "x"}, set(wanted))
    same = {source: name for name, source in fused.aliases.items() if source not in given}
    island = Island(aliases={name: source for name, source in fused.aliases.items() if source in given})
    for group in _groups(fused.stages):
        kernel, used = _kernel(group, tensors, machine)
        island.calls.append((kernel, tuple(same.get(tensor, tensor) for tensor in used)))
    for tensor in {tensor: None for _, used in island.calls for tensor in used}:
        if tensor in program.constants:
            island.constants[tensor] = program.constants[tensor]
        elif tensor in given and tensor[0] == "w":
            island.constants[tensor] = np.empty(0, np.float32)
        elif tensor not in given and tensor not in wanted:
            island.buffers[tensor] = (tensors[tensor].dtype, tensors[tensor].shape)
    return island


def _copy(name: str, source: str, tensors: dict[str, Tensor]) -> Stage:
    tensors[name] = tensors[source]
    axes = {f"i{i}": extent for i, extent in enumerate(tensors[source].shape)}
    return Stage(axes, {}, (), {name: load(source, tensors[source].dtype, [axis(each) for each in axes])})


def _groups(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Return the stages of each kernel: neighbours with little work together, others alone."""
    groups: list[list[Stage]] = []
    for stage in stages:
        alone = _splits(stage)
        if groups and not alone and not _splits(groups[-1][0]):
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def _splits(stage: Stage) -> bool:
    return stage.operations >= _WORTH_THREADS and prod(stage.axes.values()) > 1


def _kernel(group: list[Stage], tensors: dict[str, Tensor], machine: Machine) -> tuple[Kernel, tuple[str, ...]]:
    """Return the kernel of some stages and the tensors that are its buffers; stores come after reads."""
    used = tuple(dict.fromkeys([name for stage in group for name in (*stage.reads, *stage.stores)]))
    splits = _splits(group[0])
    types = {f"b{i}": tensors[name].dtype.replace("bool", "uint8") for i, name in enumerate(used)}
    write = write_kernel if splits else write_serial_kernel
    with write("generic", **types) as frame:
        stored = {name for stage in group for name in stage.stores}
        sizes = {f"b{i}": (name in stored, tensors[name].size) for i, name in enumerate(used)}
        frame.states({key: writes(count) if written else reads(count) for key, (written, count) in sizes.items()})
        buffers = {name: getattr(frame, f"b{i}") for i, name in enumerate(used)}
        for stage in group:
            for nest in nests(stage, tensors):
                threads = (frame.part, frame.parts) if splits else None
                write_nest(nest, buffers, machine, threads)
    text = hashlib.sha256(frame.kernel.func.script().encode()).hexdigest()
    name = f"generic_{text[:16]}"
    func = frame.kernel.func.with_attr("global_symbol", name)
    return Kernel(name, func, frame.kernel.buffers, splits, frame.kernel.contract), used
