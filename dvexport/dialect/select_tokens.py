"""`dv.SelectTokens(X, score) -> kept, index`: the tokens of a video transformer that go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from dvexport.decisions import TOKENS
from dvexport.dialect.spec import Operator
from dvexport.graph.graph import Builder

__all__ = ["SelectTokens"]


class SelectTokens(Operator):
    """`index` are the `keep` tokens of smallest score, ascending by score, ties by lower index; `kept = X[index]`.

    X: `[B, N, C]`; score: `[B, N]`; kept: `[B, keep, C]`; index: int64 `[B, keep]`, the decision. STA keeps
    the survivors in the order of their scores, and its next stage depends on that order (official code).
    """

    name = "SelectTokens"
    inputs = ("X", "score")
    outputs = ("kept", "index")
    attributes: ClassVar[Mapping[str, Any]] = {"keep": None, "gate": None}
    decisions: ClassVar[Mapping[str, str]] = {TOKENS.name: "index"}
    dense = ("X",)

    def infer(self, node: ir.Node) -> None:
        """The token axis becomes `keep`."""
        x = node.inputs[0]
        assert x is not None and x.shape is not None
        keep = node.attributes["keep"].as_int()
        node.outputs[0].shape, node.outputs[0].type = ir.Shape([x.shape[0], keep, x.shape[2]]), x.type
        if len(node.outputs) > 1:
            node.outputs[1].shape = ir.Shape([x.shape[0], keep])
            node.outputs[1].type = ir.TensorType(ir.DataType.INT64)

    def reference(
        self, build: Builder, inputs: Mapping[str, ir.Value | None], attributes: Mapping[str, Any]
    ) -> Sequence[ir.Value]:
        """TopK, which takes the lower of equal indices first, then a gather of whole tokens."""
        x, score, keep = inputs["X"], inputs["score"], attributes["keep"]
        assert x is not None and x.shape is not None
        batch = x.shape[0]
        _, index = build.multi("TopK", (score, build.ints(keep)), 2, axis=-1, largest=0, sorted=1)
        index.shape, index.type = ir.Shape([batch, keep]), ir.TensorType(ir.DataType.INT64)
        kept = ir.Shape([batch, keep, x.shape[2]])
        if batch == 1:  # rows of one clip: no index needs its batch before it, and STA's scores squeeze it as well
            row = build.op("Squeeze", index, build.ints(0), shape=[keep], dtype=ir.DataType.INT64)
            return [build.op("Gather", x, row, axis=1, shape=list(kept), dtype=x.dtype), index]
        place = build.op("Unsqueeze", index, build.ints(2), shape=[batch, keep, 1], dtype=ir.DataType.INT64)
        return [build.op("GatherND", x, place, batch_dims=1, shape=list(kept), dtype=x.dtype), index]

    def problems(self, node: ir.Node) -> list[str]:
        """There must be as many tokens as are kept, and a score for each."""
        found = super().problems(node)
        if found:
            return found
        x, score = node.inputs
        assert x is not None and score is not None
        keep = node.attributes["keep"].as_int()
        if x.shape is None or score.shape is None:
            return ["has tokens or scores of unknown shape"]
        if len(x.shape) != 3 or list(score.shape) != list(x.shape)[:2]:
            return [f"needs tokens [B, N, C] and scores [B, N], not {x.shape} and {score.shape}"]
        tokens = x.shape[1]
        if not isinstance(tokens, int):
            return [f"needs a fixed number of tokens, not {tokens}"]
        if not 1 <= keep <= tokens:
            found.append(f"keeps {keep} of {tokens} tokens")
        return found
