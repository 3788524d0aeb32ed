"""`[runtimes.onnx]` of a target file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from dvexport.graph.graph import OPSET
from dvexport.targets.onnx.opset import OLDEST
from dvexport.targets.table import Table, Version

__all__ = ["TABLE", "OnnxTable", "newest_opset"]

_OPSETS = {
    (1, 7): 13, (1, 8): 14, (1, 9): 15, (1, 11): 16, (1, 12): 17, (1, 14): 18, (1, 15): 19, (1, 17): 20, (1, 18): 21,
}  # fmt: skip
"""The newest opset that ONNX Runtime reads, from which version on (its documentation, "ONNX version support")."""


class OnnxTable(Table):
    """ONNX Runtime: the opset to emit and the oldest version that may run it."""

    opset: Annotated[int, Field(ge=OLDEST, le=OPSET)]
    min_version: Version

    @model_validator(mode="after")
    def _is_read(self) -> OnnxTable:
        newest = newest_opset(self.min_version)
        if self.opset > newest:
            raise ValueError(f"opset: ONNX Runtime {self.min_version} reads opsets up to {newest}")
        return self


def newest_opset(version: str) -> int:
    """Return the newest opset that a version of ONNX Runtime reads; 0: it reads none of those that are written here."""
    numbers = (*map(int, version.split(".")), 0)[:2]
    return max((opset for first, opset in _OPSETS.items() if first <= numbers), default=0)


def oldest_version() -> str:
    """Return the oldest version of ONNX Runtime that a device of the catalogue may have."""
    from dvexport.targets import catalogue

    tables = [catalogue.load(name).runtime(OnnxTable) for name in catalogue.names()]
    return min((said.min_version for said in tables if said), key=lambda text: [int(each) for each in text.split(".")])


TABLE = OnnxTable
