"""What a node of an artifact is there for, told from its operator; a backend with other words has its own table.

Time that a gated artifact spends outside its convolutions is the price of the gate: the decision
(policy network, mask) and the data movement around the convolutions (gather, scatter, merge). Matrix
products and softmax compute, since tile lowerings convolve by the one and attention has both; those of a
policy are told apart by the module they were traced in (`NodeTime.decides`).
"""

from __future__ import annotations

__all__ = ["ROLES", "node_role"]

ROLES = {
    "compute": {"Conv", "FusedConv", "ConvTranspose", "NhwcFusedConv", "QLinearConv", "ConvInteger",
                "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Softmax"},
    "decide": {
        "GlobalAveragePool", "AveragePool", "ReduceMean", "ReduceSum", "ReduceMax", "ArgMax", "TopK", "NonZero",
        "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "And", "Or", "Not", "BatchNormalization",
        "Sigmoid", "Tanh",
    },
    "move": {
        "Gather", "GatherND", "GatherElements", "ScatterND", "ScatterElements", "Where", "Concat",
        "Slice", "Split", "Pad", "Transpose", "Reshape", "Expand", "Tile", "Resize", "Squeeze",
        "Unsqueeze", "Compress", "Cast", "Mul", "Add", "ReorderInput", "ReorderOutput", "Identity",
        "MemcpyFromHost", "MemcpyToHost", "SpaceToDepth", "DepthToSpace",
    },
    "control": {"If", "Loop", "Scan"},
}  # fmt: skip
"""Operators by role. `control` nodes enclose the nodes of their branches, so they are never summed."""

_ROLE_OF = {op: role for role, ops in ROLES.items() for op in ops}


def node_role(op: str) -> str:
    """Return the role of operator `op`, `other` when the table does not list it."""
    return _ROLE_OF.get(op, "other")
