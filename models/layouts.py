"""Key names and shapes of known checkpoints: what they are called, what they tell about the model.

A layout is recognised by its keys and renamed to dvexport's own names (torchvision's for the
backbone). Sources of the official names: AdaFuse 91c3a5d, D-STEP d466c2b, TSM 1f6a834.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dvexport.errors import CheckpointError

__all__ = ["Layout", "guess_foreign", "infer_mobilenet", "infer_resnet", "recognise"]

_BLOCK_COUNTS: dict[tuple[int, ...], int] = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50}

_RENAMES = (
    (r"\.downsample([01])\.", r".downsample.\1."),
    (r"\.policy_net\.gate_(fc0|fc1|bn)\.", r".gates.policy.\1."),
    (r"\.mask_s\.atten_s\.", r".gates.mask.conv."),
    (r"\.net\.", "."),
)

_FOREIGN = (
    (r"^blocks\.\d+\.attn\.|^encoder\.blocks\.|^videomae\.", "VideoMAE or STA"),
    (r"relative_position_bias_table", "Video Swin"),
    (r"conv\.conv_xy|\.branch2\.", "X3D"),
    (r"lite_backbone|base_model_list", "AR-Net"),
    (r"inception_\d", "a BN-Inception model"),
)


@dataclass(frozen=True)
class Layout:
    """A checkpoint under dvexport's names.

    Attributes:
        kind: name of the layout, for reports.
        family: `resnet` or `mobilenet`.
        state: tensors by dvexport's names, shared layers under every block that has them.
        shifted: the file marks shifted convolutions (`.net.`).
        marks_shift: the layout would mark shifted convolutions if there were any.
        shared: policies were stored as shared layers.
    """

    kind: str
    family: str
    state: dict[str, Any]
    shifted: bool
    marks_shift: bool
    shared: bool


def recognise(state: Mapping[str, Any], where: str) -> Layout:
    """Rename the keys of a state_dict; CheckpointError if no known layout fits."""
    keys = {key.removeprefix("module."): value for key, value in state.items()}
    keys = {key: value for key, value in keys.items() if not key.endswith("num_batches_tracked")}
    official = any(key.startswith("base_model.") for key in keys)
    keys = {key.removeprefix("base_model."): value for key, value in keys.items()}
    shifted = any(".net." in key for key in keys)
    ada = any(".policy_net." in key or ".downsample0." in key for key in keys)
    mobile = any(key.startswith("features.") for key in keys)
    if not mobile and not any(key.startswith("layer1.") for key in keys):
        raise _unknown_layout(state, where)
    tables, keys = _split_shared_tables(keys)
    classifier = "classifier." if mobile else "fc."
    renamed = {_rename(key, classifier): value for key, value in keys.items()}
    _check_shared_tables(tables, renamed, where)
    static = "official TSM / TSN" if official or shifted else "plain"
    return Layout(
        kind="official AdaFuse / D-STEP" if ada else static,
        family="mobilenet" if mobile else "resnet",
        state=renamed,
        shifted=shifted,
        marks_shift=official and not ada,
        shared=bool(tables),
    )


def _rename(key: str, classifier: str) -> str:
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return classifier + key.removeprefix("new_fc.") if key.startswith("new_fc.") else key


def _split_shared_tables(keys: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate `gate_fc0s.{2Cin}_{3Cmid}.*`, which repeat what stands under each block."""
    tables = {key: value for key, value in keys.items() if re.match(r"gate_fc[01]s\.", key)}
    return tables, {key: value for key, value in keys.items() if key not in tables}


def _check_shared_tables(tables: Mapping[str, Any], renamed: Mapping[str, Any], where: str) -> None:
    """Check that the blocks hold the same layers as the shared table."""
    import torch

    for key, value in renamed.items():
        match = re.fullmatch(r"(.*)\.gates\.policy\.(fc[01])\.(weight|bias)", key)
        if not tables or match is None:
            continue
        block, layer, kind = match.groups()
        inputs = renamed[f"{block}.gates.policy.fc0.weight"].shape[1]
        outputs = renamed[f"{block}.gates.policy.fc1.weight"].shape[0]
        table_key = f"gate_{layer}s.{inputs}_{outputs}.{kind}"
        if table_key not in tables or not torch.equal(tables[table_key], value):
            raise CheckpointError(
                "the checkpoint contradicts itself: a shared policy net differs from its copy in a block",
                where=f"{where}: {table_key} and {key}",
            )


def _unknown_layout(state: Mapping[str, Any], where: str) -> CheckpointError:
    first = ", ".join(list(state)[:4])
    foreign = guess_foreign(state)
    return CheckpointError(
        "the checkpoint's keys fit no model that dvexport has",
        where=where,
        why=f"its keys begin with {first}" + (f"; it looks like {foreign}" if foreign else ""),
        hint="write a factory for your own model: docs/adding-a-model.md",
    )


def guess_foreign(state: Mapping[str, Any]) -> str | None:
    """Return what other family the keys belong to, None if unknown."""
    for pattern, name in _FOREIGN:
        if any(re.search(pattern, key.removeprefix("module.")) for key in state):
            return name
    return None


def infer_resnet(layout: Layout, where: str) -> dict[str, Any]:
    """Return the options of `ResNetConfig` that names and shapes of the weights tell."""
    state = layout.state
    facts: dict[str, Any] = {"depth": _depth(state, where)}
    for option, key, axis in (("width", "conv1.weight", 0), ("classes", "fc.weight", 0)):
        if key not in state:
            raise CheckpointError("the checkpoint lacks a layer", where=f"{where}: {key}")
        facts[option] = int(state[key].shape[axis])
    facts["width"] /= 64
    policies = _blocks_with(state, "gates.policy.fc0.weight")
    masks = _blocks_with(state, "gates.mask.conv.weight")
    facts["channel_gates"], facts["tile_gates"] = bool(policies), bool(masks)
    if policies or masks:
        facts["enabled_stages"] = tuple(sorted({int(block[5]) - 1 for block in policies or masks}))
    if policies:
        facts |= _policy_facts(state, policies, where)
        facts["shared_policies"] = layout.shared
    if layout.shifted or layout.marks_shift:
        facts["shift"] = "bidirectional" if layout.shifted else "none"
    return facts


def _depth(state: Mapping[str, Any], where: str) -> int:
    counts = tuple(
        len({key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")}) for stage in range(1, 5)
    )
    depth = _BLOCK_COUNTS.get(counts)
    bottleneck = "layer1.0.conv3.weight" in state
    if depth is None or bottleneck != (depth == 50):
        raise CheckpointError(
            "the checkpoint is of a ResNet that dvexport has not",
            where=where,
            why=f"it has {counts} {'bottleneck' if bottleneck else 'basic'} blocks",
            hint="ResNet-18 and ResNet-50 are supported",
        )
    return depth


def _blocks_with(state: Mapping[str, Any], suffix: str) -> list[str]:
    return [key.removesuffix("." + suffix) for key in state if key.endswith("." + suffix)]


def _policy_facts(state: Mapping[str, Any], blocks: list[str], where: str) -> dict[str, Any]:
    """Return history, actions, hidden units and batch norm of the policies of `blocks`."""
    hidden, facts = {}, []
    for block in blocks:
        outputs, inputs = state[f"{block}.conv1.weight"].shape[:2]
        fc0 = state[f"{block}.gates.policy.fc0.weight"]
        fc1 = state.get(f"{block}.gates.policy.fc1.weight")
        if fc1 is None:
            raise CheckpointError("a policy net lacks its second layer", where=f"{where}: {block}")
        history, actions = fc0.shape[1] / inputs, fc1.shape[0] / outputs
        if (history, actions) not in ((1, 2), (2, 2), (2, 3)):
            raise CheckpointError(
                "a policy net has a shape that no option gives",
                where=f"{where}: {block}",
                why=f"it reads {history:g} frames and has {actions:g} outputs per channel",
                hint="granularity above 1 and gated channel ranges are not supported",
            )
        hidden[outputs] = fc0.shape[0]
        facts.append((history == 2, actions == 3 or history == 1, f"{block}.gates.policy.bn.weight" in state))
    if len(set(facts)) != 1:
        raise CheckpointError("the policy nets of the checkpoint differ in their options", where=where)
    history, skipping, gate_bn = facts[0]
    return {"history": history, "skipping": skipping, "gate_bn": gate_bn} | _hidden_facts(hidden, where)


def _hidden_facts(hidden: Mapping[int, int], where: str) -> dict[str, int]:
    """Return `hidden` if the policies are equally wide, `hidden_quota` if width times channels is equal."""
    units, products = set(hidden.values()), {channels * h for channels, h in hidden.items()}
    if len(units) == 1:
        return {"hidden": units.pop(), "hidden_quota": 0}
    if len(products) == 1:
        return {"hidden_quota": products.pop()}
    sizes = ", ".join(f"{h} for {channels} channels" for channels, h in sorted(hidden.items()))
    raise CheckpointError("the hidden sizes of the policy nets follow no rule", where=where, why=sizes)


def infer_mobilenet(layout: Layout, where: str) -> dict[str, Any]:
    """Return the options of `MobileNetConfig` that names and shapes of the weights tell."""
    state = layout.state
    key = "features.2.conv.6.weight"
    if key not in state or "classifier.weight" not in state:
        missing = key if key not in state else "classifier.weight"
        raise CheckpointError(
            "the checkpoint is no MobileNetV2 of the official TSM layout",
            where=where,
            why=f"it has no {missing}",
        )
    facts: dict[str, Any] = {"classes": int(state["classifier.weight"].shape[0])}
    widths = [w for w in (0.25, 0.5, 0.75, 1.0, 1.3, 1.4) if _mobile_widths(w) == _seen_widths(state)]
    if widths:
        facts["width"] = widths[0]
    if layout.shifted or layout.marks_shift:
        facts["shift"] = "bidirectional" if layout.shifted else "none"
    return facts


def _mobile_widths(width: float) -> tuple[int, ...]:
    return tuple(-(-int(c * width * 1000) // 8000) * 8 for c in (24, 32, 64, 96, 160, 320))


def _seen_widths(state: Mapping[str, Any]) -> tuple[int, ...]:
    last = [state.get(f"features.{i}.conv.6.weight") for i in (2, 4, 7, 11, 14, 17)]
    return tuple(0 if weight is None else int(weight.shape[0]) for weight in last)
