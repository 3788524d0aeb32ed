"""The artifact that ships, with decisions as inputs: what read a decision reads an input, all else is the same bytes.

An artifact shows every decision as an output, its probe. So it can be forced as it is, with the weights, the order of
channels and the conditionals that it has, and need not be lowered once more for it.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx

from dvexport.decisions import PROBE, decision_key, forced_name

__all__ = ["force_artifact"]


def force_artifact(artifact: bytes) -> tuple[bytes, set[tuple[str, str]]]:
    """Return an artifact with its decisions as inputs (`expose_probes.forced_name`), and which these are.

    A decision that nothing reads gets no input: it is a constant, or the same value as another one's.
    """
    model = onnx.load_model_from_string(artifact)
    probes = {out.name: key for out in model.graph.output if (key := decision_key(out.name, PROBE))}
    read: set[str] = set()
    _redirect(model.graph, probes, read)
    for out in model.graph.output:
        if out.name in read:
            given = model.graph.input.add()
            given.CopyFrom(out)
            given.name = forced_name(*probes[out.name])
    return model.SerializeToString(deterministic=True), {probes[name] for name in read}


def _redirect(graph: onnx.GraphProto, probes: dict[str, tuple[str, str]], read: set[str]) -> None:
    """Let nodes read forced decisions, in branches too; names are used once in a graph with its branches."""
    for node in graph.node:
        if _shows(node, probes):
            continue
        for position, name in enumerate(node.input):
            if name in probes:
                read.add(name)
                node.input[position] = forced_name(*probes[name])
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _redirect(attribute.g, probes, read)


def _shows(node: onnx.NodeProto, probes: Collection[str]) -> bool:
    """Tell whether a node only shows a decision that two gates share under the second one's name."""
    return node.op_type == "Identity" and node.output[0] in probes
