"""Loops for operators that TVM would leave to a library of its own, or warns of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["LEGALIZE"]


def _topk(builder: Any, call: Any) -> Any:
    """The k largest or smallest along an axis, in order.

    The rank of an element is the number of elements that come before it. The r-th result is the element of rank r:
    two plain reductions, without a data-dependent loop or store.
    """
    from tvm import te
    from tvm.tirx import Select, const

    attrs = call.attrs
    rank_of, k, largest = len(call.args[0].ty.shape), int(attrs.k), bool(attrs.largest)
    where = int(attrs.axis) % rank_of

    def ranks(x: Any) -> Any:
        j = te.reduce_axis((0, x.shape[where]), "j")

        def rank(*at: Any) -> Any:
            mine, other = x[at], x[(*at[:where], j, *at[where + 1 :])]
            before = (other > mine) if largest else (other < mine)
            tie = (other == mine) & (j < at[where])
            return te.sum(Select(before | tie, const(1, "int64"), const(0, "int64")), axis=j)

        return te.compute(x.shape, rank, name="rank")

    def chosen(x: Any, rank: Any, *, index: bool) -> Any:
        i = te.reduce_axis((0, x.shape[where]), "i")
        shape = [*x.shape[:where], k, *x.shape[where + 1 :]]
        dtype = str(attrs.dtype) if index else str(x.dtype)

        def pick(*at: Any) -> Any:
            there = (*at[:where], i, *at[where + 1 :])
            value = i.astype(dtype) if index else x[there]
            return te.sum(Select(rank[there] == at[where], value, const(0, dtype)), axis=i)

        return te.compute(shape, pick, name="chosen")

    def values(x: Any) -> Any:
        return chosen(x, ranks(x), index=False)

    def indices(x: Any) -> Any:
        return chosen(x, ranks(x), index=True)

    from tvm import relax

    made = {"values": [values], "indices": [indices], "both": [values, indices]}[str(attrs.ret_type)]
    results = [builder.call_te(function, call.args[0]) for function in made]
    return results[0] if len(results) == 1 else relax.Tuple([builder.emit(result) for result in results])


def _take(builder: Any, call: Any) -> Any:
    """Elements at the places that indices name, which ONNX's Gather has brought into range.

    TVM's own are the same, with a warning to standard error that places out of range would be read.
    """
    from tvm import te

    where = int(call.attrs.axis) % len(call.args[0].ty.shape)

    def take(x: Any, indices: Any) -> Any:
        rank = len(indices.shape)

        def pick(*at: Any) -> Any:
            return x[(*at[:where], indices[at[where : where + rank]], *at[where + rank :])]

        return te.compute([*x.shape[:where], *indices.shape, *x.shape[where + 1 :]], pick, name="take")

    return builder.call_te(take, *call.args)


LEGALIZE: dict[str, Callable[[Any, Any], Any]] = {"relax.take": _take, "relax.topk": _topk}
"""For `relax.transform.LegalizeOps`: loops by operator."""
