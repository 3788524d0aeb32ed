"""A SparseConv with chosen inputs, marked with a lowering: what the lowering passes are tested on."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from graphs import check, data, graph, run, weights

from dvexport.passes.clean_up import CleanUp

__all__ = ["feeds", "lowers"]


def feeds(frames: int, pattern: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of one run; `pattern` is `none`, `some` or `all` of the rows, tiles and channels."""
    rng = np.random.default_rng(seed)
    share = {"none": 0.0, "some": 0.5, "all": 1.0}[pattern]
    active = rng.random((frames, 32)) < share
    return {
        "x": data(frames, 32, 8, 8, seed=seed) * active[:, :, None, None],
        "rows": rng.random((frames, 32)) < share,
        "tiles": rng.random((frames, 2, 2)) < share,
        "coarse": rng.random((frames, 3, 3)) < share,
        "active_in": active,
        "residual": data(frames, 32, 8, 8, seed=seed + 1),
        "base": data(frames, 32, 8, 8, seed=seed + 2),
    }


def lowers(step: ir.passes.PassBase, lowering: str, arguments: str, frames: int = 1, **attributes: str) -> ir.Model:
    """Lower `SparseConv(x, W, B, arguments)`, compare with its reference, return the result."""
    extra = "".join(f', {name}="{text}"' for name, text in attributes.items())
    model = graph(
        f"""g (float[{frames},32,8,8] x, float[32,32,3,3] W, float[32] B, bool[{frames},32] rows,
            bool[{frames},2,2] tiles, bool[{frames},3,3] coarse, bool[{frames},32] active_in,
            float[{frames},32,8,8] residual, float[{frames},32,8,8] base) => (float[{frames},32,8,8] y)
        {{ y = dv.SparseConv<gate="g", pads=[1,1,1,1]{extra}>(x, W, B, {arguments}) }}""",
        W=weights(32, 32, 3), B=data(32),
    )  # fmt: skip
    before = model.clone()
    (node,) = model.graph
    node.metadata_props["dv.lowering"] = lowering
    assert step(model).modified
    check(model)
    assert "SparseConv" not in {node.op_type for node in model.graph}
    ready = model.clone()
    CleanUp()(ready)  # which names what lies in branches
    for pattern in ("none", "some", "all"):
        given = feeds(frames, pattern)
        expected, found = run(before, **given)["y"], run(ready, **given)["y"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()), err_msg=pattern)
    return model
