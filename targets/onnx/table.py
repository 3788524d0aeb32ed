"""`[runtimes.onnx]` of a target file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dvexport.targets.table import Table, Version

__all__ = ["TABLE", "OnnxTable"]


class OnnxTable(Table):
    """ONNX Runtime: the opset to emit and the oldest version that may run it."""

    opset: Annotated[int, Field(ge=13)]
    min_version: Version


TABLE = OnnxTable
