"""The gate dialect: the `dv` operator domain. One operator a file."""

from dvexport.dialect import delay, frame_mean, gated_conv, merge, rows, select_tokens, sparse_conv
from dvexport.dialect.spec import OPERATORS, Operator, attach_references, operator_of

__all__ = [
    "OPERATORS",
    "Operator",
    "attach_references",
    "delay",
    "frame_mean",
    "gated_conv",
    "merge",
    "operator_of",
    "rows",
    "select_tokens",
    "sparse_conv",
]
