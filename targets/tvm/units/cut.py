"""Cut a graph into units of work: what a hand-made kernel does, and islands of everything else.

Convolutions take the sum and the activation after them along. What no kernel of ours knows is grouped: all such nodes
that can run at the same moment form one island, which Relax compiles (`generic.py`). Units come out in an
order in which they can run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dvexport.dialect.facts import is_nonnegative
from dvexport.dialect.spec import operator_of
from dvexport.errors import UsageError
from dvexport.graph.graph import DECIDES, DV, array_of, source_of
from dvexport.targets.tvm.kernels.plane import MOST_STEP
from dvexport.targets.tvm.units.owners import gate_owners
from dvexport.targets.tvm.units.transformers import token_units
from dvexport.targets.tvm.units.unit import Unit

__all__ = ["PLANAR_KINDS", "ConvUnit", "Unit", "cut", "is_planar"]

PLANAR_KINDS = ("conv", "max_pool", "merge", "relu", "add", "concat", "slice")
"""Kinds of units whose outputs are held as planes."""

_IMAGE_RANK = 4


@dataclass
class ConvUnit(Unit):
    """A convolution with what is fused into it: act(conv(x) + bias + residual), written over `base`."""

    x: ir.Value = None  # type: ignore[assignment]
    weight: np.ndarray = None  # type: ignore[assignment]
    bias: np.ndarray = None  # type: ignore[assignment]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, ...] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    relu: bool = False
    rows: ir.Value | None = None
    cols: ir.Value | None = None
    tiles: ir.Value | None = None
    residual: ir.Value | None = None
    base: ir.Value | None = None


def cut(model: ir.Model, gates: Collection[str] = ()) -> list[Unit]:
    """Return the units of a model, in an order in which they can run.

    Args:
        model: frames fixed, as the backend's passes leave it (`targets/tvm/passes.py`); not modified.
        gates: names of the gates, so that what a dense model does in their place is told apart.
    """
    nodes = list(model.graph)
    planar = _planar_values(model)
    units: list[Unit] = list(token_units(model, planar))
    taken = {node for unit in units for node in unit.nodes}
    for node in nodes:
        if node in taken:
            continue
        unit = _unit(node, planar)
        if unit is not None:
            units.append(unit)
            taken.update(unit.nodes)
    levels, rest = _levels(nodes, units)
    islands = [Unit("island", group) for _, group in sorted(rest.items())]
    owners = gate_owners(model, gates)
    read = {value for unit in units for value in unit.reads or ()}
    for unit in (*units, *islands):
        _set_edges(unit, read)
        unit.gate = next((owners[node] for node in unit.nodes if node in owners), "")
    order = sorted(units, key=lambda unit: (levels[unit.nodes[-1]], nodes.index(unit.nodes[-1])))
    return list(_interleave(order, islands, levels))


def is_planar(value: ir.Value) -> bool:
    """Tell whether a value has an image's shape and type."""
    return value.shape is not None and len(value.shape) == _IMAGE_RANK and value.dtype == ir.DataType.FLOAT


def _interleave(units: Iterable[Unit], islands: list[Unit], levels: dict[ir.Node, int]) -> Iterator[Unit]:
    """Yield the units level by level, each level's islands after its units."""
    waiting = [(levels[island.nodes[0]], island) for island in islands]
    for unit in units:
        while waiting and waiting[0][0] < levels[unit.nodes[-1]]:
            yield waiting.pop(0)[1]
        yield unit
    yield from (island for _, island in waiting)


_Level = tuple[int, int]


def _levels(nodes: list[ir.Node], units: list[Unit]) -> tuple[dict[ir.Node, int], dict[_Level, list[ir.Node]]]:
    """Return the level of every node, and what is left over by level and turn.

    A unit is a level above all it reads; other nodes are on the level of the highest value they read. Within a level
    what chooses tokens has turns of its own, the odd ones, so that its time can be told.
    """
    unit_of = {node: unit for unit in units for node in unit.nodes}
    levels: dict[ir.Node, int] = {}
    turns: dict[ir.Node, int] = {}
    rest: dict[_Level, list[ir.Node]] = {}
    for node in nodes:
        if node in levels or (node in unit_of and node is not unit_of[node].nodes[-1]):
            continue  # a unit runs where its last node stands: by then all it reads has been computed
        own = unit_of[node].nodes if node in unit_of else [node]
        made_by = [v.producer() for n in own for v in n.inputs if v is not None and v.const_value is None]
        producers = [p for p in made_by if p is not None and p not in own and p in levels]
        level = max((levels[p] for p in producers), default=0)
        if node in unit_of:
            levels.update(dict.fromkeys(own, level + 1))
        elif node.op_type != "Constant":
            turn = max((turns[p] for p in producers if p in turns and levels[p] == level), default=0)
            turn += (turn + (DECIDES in node.metadata_props)) % 2
            levels[node], turns[node] = level, turn
            rest.setdefault((level, turn), []).append(node)
    return levels, rest


def _set_edges(unit: Unit, read: Collection[ir.Value]) -> None:
    """Set what a unit reads from outside and what it must write; `read`: values that units read past views of them."""
    inside = set(unit.nodes)
    reads = [v for node in unit.nodes for v in node.inputs if v is not None and array_of(v) is None]
    if unit.reads is not None:
        reads = [v for v in unit.reads if array_of(v) is None]
    unit.inputs = list(dict.fromkeys(v for v in reads if v.producer() not in inside))
    written = [v for node in unit.nodes for v in node.outputs]
    unit.outputs = [
        v for v in written if v.is_graph_output() or v in read or any(user not in inside for user, _ in v.uses())
    ]


def _planar_values(model: ir.Model) -> set[ir.Value]:
    """Return the values that are held as planes: what our kernels make of images."""
    planar = {value for value in model.graph.inputs if is_planar(value)}
    for node in model.graph:
        keeps = node.op_type in ("Relu", "Add", "Concat", "Slice", "MaxPool", "AveragePool", "Identity")
        makes = node.domain == DV or node.op_type == "Conv"
        inputs = [v for v in node.inputs if v is not None and array_of(v) is None]
        if makes or (keeps and inputs and all(v in planar for v in inputs)):
            planar.update(v for v in node.outputs if is_planar(v))
    return planar


def _unit(node: ir.Node, planar: set[ir.Value]) -> Unit | None:
    """Return the unit that starts at a node, or None where no kernel of ours fits."""
    if node.domain == DV:
        makers = {"SparseConv": _sparse_conv, "Merge": lambda merge: Unit("merge", [merge])}
        return makers[node.op_type](node)
    make = _RULES.get(node.op_type)
    if make is None or node.domain:
        return None
    return make(node, planar)


def _sparse_conv(node: ir.Node) -> ConvUnit:
    operator = operator_of(node)
    assert operator is not None and operator.name == "SparseConv", node.op_type
    inputs, attributes = operator.bind(node), operator.attributes_of(node)
    weight = array_of(inputs["W"])
    assert weight is not None and inputs["X"] is not None
    step = attributes["strides"][1]
    if step > MOST_STEP:
        raise UsageError(
            f"the native backend has no kernel for a gated convolution with a stride of {step} across",
            where=f"gate {attributes['gate']}, {source_of(node)}",
            why=f"its kernels step over at most {MOST_STEP} columns",
            hint="take a smaller stride, or export with another backend: --backend onnx",
        )
    return ConvUnit(
        "conv", [node], x=inputs["X"], weight=weight, bias=_bias(inputs["B"], len(weight)),
        strides=tuple(attributes["strides"]), pads=tuple(attributes["pads"]), dilations=tuple(attributes["dilations"]),
        relu=attributes["activation"] == "relu", rows=inputs["rows"], cols=inputs["active_in"],
        tiles=inputs["tiles"], residual=inputs["residual"], base=inputs["base"],
    )  # fmt: skip


def _conv(node: ir.Node, planar: set[ir.Value]) -> ConvUnit | None:
    weight = array_of(node.inputs[1])
    x = node.inputs[0]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    given = node.attributes
    legal = weight is not None and weight.ndim == _IMAGE_RANK and x in planar and _ints(node, "group", [1]) == [1]
    padded = "auto_pad" not in given or given["auto_pad"].as_string() == "NOTSET"
    steps = _ints(node, "strides", [1])[-1] <= MOST_STEP
    if not legal or not padded or not steps or (bias is not None and array_of(bias) is None):
        return None
    assert weight is not None and x is not None
    unit = ConvUnit(
        "conv", [node], x=x, weight=weight, bias=_bias(bias, len(weight)),
        strides=_pair(_ints(node, "strides", [1, 1])), pads=tuple(_ints(node, "pads", [0, 0, 0, 0])),
        dilations=_pair(_ints(node, "dilations", [1, 1])),
    )  # fmt: skip
    _take_along(unit, planar)
    return unit


def _take_along(unit: ConvUnit, planar: set[ir.Value]) -> None:
    """Fuse Relu, or Add and Relu, where nobody else reads what is between."""
    after = _take_copies(unit)
    if after is not None and after.op_type == "Relu" and not after.domain:
        unit.relu = True
        unit.nodes.append(after)
        _take_copies(unit)
    elif after is not None and after.op_type == "Add" and not after.domain:
        other = next((v for v in after.inputs if v is not unit.nodes[-1].outputs[0]), None)
        relu = _only_user(after.outputs[0])
        same = other is not None and other in planar and other.shape == after.outputs[0].shape
        if same and relu is not None and relu.op_type == "Relu" and _comes_last(unit.nodes[0], other):  # type: ignore[arg-type]
            unit.residual, unit.relu = other, True
            unit.nodes += [after, relu]


def _take_copies(unit: ConvUnit) -> ir.Node | None:
    """Take along what only renames the result; return its only user after that."""
    after = _only_user(unit.nodes[-1].outputs[0])
    while after is not None and after.op_type == "Identity":
        unit.nodes.append(after)
        after = _only_user(after.outputs[0])
    return after


def _comes_last(conv: ir.Node, other: ir.Value) -> bool:
    """Of two convolutions that are summed, the later one takes the sum along."""
    producer = other.producer()
    private = _only_user(other) is not None
    while producer is not None and producer.op_type == "Identity":
        value = producer.inputs[0]
        assert value is not None
        private = private and _only_user(value) is not None
        producer = value.producer()
    if producer is None or producer.op_type != "Conv" or not private:
        return True
    assert conv.graph is not None
    order = {node: i for i, node in enumerate(conv.graph)}
    return order[producer] < order[conv]


def _only_user(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def _gemm(node: ir.Node, planar: set[ir.Value]) -> Unit | None:
    weight = array_of(node.inputs[1])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    given = node.attributes
    plain = all(given[key].as_float() == 1 for key in ("alpha", "beta") if key in given)
    transposed = _int(node, "transB", 0) == 1 and _int(node, "transA", 0) == 0
    if weight is None or not plain or not transposed or (bias is not None and array_of(bias) is None):
        return None
    if bias is not None and array_of(bias).shape != (len(weight),):  # type: ignore[union-attr]
        return None
    unit = Unit("gemm", [node])
    after = _only_user(node.outputs[0])
    if after is not None and after.op_type == "Relu":
        unit.nodes.append(after)
    return unit


def _max_pool(node: ir.Node, planar: set[ir.Value]) -> Unit | None:
    x = node.inputs[0]
    assert x is not None
    pads = _ints(node, "pads", [0] * 4)
    plain = _int(node, "ceil_mode", 0) == 0 and _ints(node, "dilations", [1, 1]) == [1, 1] and len(node.outputs) == 1
    # The padding of our planes is zero; that of a maximum is minus infinity.
    steps = _ints(node, "strides", [1])[-1] <= MOST_STEP
    if x not in planar or not plain or not steps or (any(pads) and not is_nonnegative(x)):
        return None
    return Unit("max_pool", [node])


def _avg_pool(node: ir.Node, planar: set[ir.Value]) -> Unit | None:
    kernel, strides = _ints(node, "kernel_shape", []), _ints(node, "strides", [1, 1])
    plain = _int(node, "ceil_mode", 0) == 0 and not any(_ints(node, "pads", [0] * 4))
    if node.inputs[0] not in planar or not plain or kernel != strides:
        return None
    return Unit("avg_pool", [node])


def _mean(node: ir.Node, planar: set[ir.Value]) -> Unit | None:
    axes = array_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.inputs[0] not in planar or axes is None or sorted(int(a) % _IMAGE_RANK for a in axes) != [2, 3]:
        return None
    return Unit("mean", [node])


def _elementwise(node: ir.Node, planar: set[ir.Value]) -> Unit | None:
    inputs = [v for v in node.inputs if v is not None]
    same = all(v in planar and v.shape == node.outputs[0].shape for v in inputs)
    return Unit(node.op_type.lower(), [node]) if same else None


def _concat(node: ir.Node, planar: set[ir.Value]) -> Unit | None:
    axis = _int(node, "axis", 0)
    return Unit("concat", [node]) if node.outputs[0] in planar and axis in (0, 1) else None


def _slice(node: ir.Node, planar: set[ir.Value]) -> Unit | None:
    if node.outputs[0] not in planar or len(node.inputs) < 4:
        return None
    axes = array_of(node.inputs[3])
    steps = array_of(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1, np.int64)
    fixed = axes is not None and steps is not None and all(array_of(v) is not None for v in node.inputs[1:3])
    if not fixed or len(axes) != 1 or int(axes[0]) not in (0, 1) or int(steps[0]) != 1:  # type: ignore[index,arg-type]
        return None
    return Unit("slice", [node])


def _identity(node: ir.Node, planar: set[ir.Value]) -> Unit | None:
    return Unit("copy", [node]) if array_of(node.inputs[0]) is None else None


_RULES = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MaxPool": _max_pool,
    "AveragePool": _avg_pool,
    "ReduceMean": _mean,
    "Relu": _elementwise,
    "Add": _elementwise,
    "Concat": _concat,
    "Slice": _slice,
    "Identity": _identity,
}


def _bias(value: ir.Value | None, count: int) -> np.ndarray:
    array = array_of(value)
    return np.zeros(count, np.float32) if array is None else array


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    if name not in node.attributes:
        return default
    attribute = node.attributes[name]
    return [attribute.as_int()] if attribute.type == ir.AttributeType.INT else list(attribute.as_ints())


def _pair(values: list[int]) -> tuple[int, int]:
    first, second = values
    return first, second
