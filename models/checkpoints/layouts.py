"""Key names and shapes of known checkpoints: what they are called, what they tell about the model.

A layout is recognised by its keys and renamed to dvexport's own names (torchvision's for the
backbone). Sources of the official names: AdaFuse 91c3a5d, D-STEP d466c2b, TSM 1f6a834. No key is lost on
the way but counters of batches: two that get one name, or tables without a reader, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dvexport.errors import CheckpointError
from dvexport.models.checkpoints.shift_marks import shift_place

__all__ = [
    "Layout",
    "check_colours",
    "guess_foreign",
    "infer_mobilenet",
    "infer_resnet",
    "mobilenet_name",
    "recognise",
    "renamed",
    "resnet_name",
    "shape_of",
]

_DEPTHS: dict[tuple[tuple[int, ...], bool], int] = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
"""Depth by blocks of each stage and whether they are bottlenecks."""
_SUPPORTED_DEPTHS = (18, 50)

_RENAMES = (
    (r"\.downsample([01])\.", r".downsample.\1."),
    (r"\.policy_net\.gate_(fc0|fc1|bn)\.", r".gates.policy.\1."),
    (r"\.mask_s\.atten_s\.", r".gates.mask.conv."),
    (r"^new_fc\.", "fc."),
)

_VARIANTS = (
    (r"^layer\d\.net\.\d", "TSM with temporal pooling (--temporal_pool)"),
    (r"^layer\d\.\d+\.(block|nl)\.", "TSM with non-local blocks (--non_local)"),
    (r"\.policy_net2\.", "AdaFuse with a second gate in each block (--dense_in_block)"),
    (r"\.policy_net\.gate_fc2\.", "AdaFuse with policies of three layers (--triple_linear)"),
    (r"\.policy_net\.gate_conv_embed", "AdaFuse with policies that convolve (--gate_conv_embed_type)"),
    (r"\.gate_hist_", "AdaFuse with a convolution on what it reuses (--gate_history_conv_type)"),
    (r"^attention_(fc|bn)", "AdaFuse with attention over frames (--policy_attention)"),
    (r"\.mask_c\d?\.atten_c\.", "DGNet"),
    (r"\.masker\.", "DynConv"),
    (r"\.conv\d\.(mask|threshold)$", "CGNet"),
    (r"^exit_selector\.", "FrameExit"),
)
"""Models that look like a known one but for some keys: what those keys are, by pattern."""

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
        family: `resnet`, `mobilenet`, `vit` or `video_swin`.
        state: tensors by dvexport's names, shared layers under every block that has them.
        shifted: whether blocks are shifted, as the file marks it (`.net.`); None where the layout has no such mark.
        shift_place: where blocks are shifted if they are (`ResNetConfig`); None where the layout leaves it open.
        shared: policies were stored as shared layers.
        window: tokens of a window in time, height and width, where tables tell it (Video-Swin).
        positions: a stored table of positions `[1, tokens, channels]`, None if there is none (VideoMAE).
    """

    kind: str
    family: str
    state: dict[str, Any]
    shifted: bool | None = None
    shift_place: str | None = None
    shared: bool = False
    window: tuple[int, int, int] | None = None
    positions: Any = None


def recognise(state: Mapping[str, Any], where: str) -> Layout:
    """Rename the keys of a state_dict.

    Raises:
        CheckpointError: no known layout fits, or one that dvexport does not support does, by its name.
    """
    keys = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    keys = renamed(keys, lambda key: key.removeprefix("module."), where)
    official = any(key.startswith("base_model.") for key in keys)
    keys = renamed(keys, lambda key: key.removeprefix("base_model."), where)
    _refuse_variants(keys, where)
    for marks, read in _LAYOUTS:
        if all(any(re.search(mark, key) for key in keys) for mark in marks):
            return read(keys, official, where)
    raise _unknown_layout(state, where)


def _gated(keys: dict[str, Any], official: bool, where: str) -> Layout:
    tables, keys = _split_shared_tables(keys)
    keys = renamed(keys, _rename, where)
    _check_shared_tables(tables, keys, where)
    return Layout("official AdaFuse / D-STEP", "resnet", keys, None, "block", bool(tables))


def _mobilenet(keys: dict[str, Any], official: bool, where: str) -> Layout:
    place = shift_place(keys, True, where)
    unmarked = renamed(keys, _without_mark, where)
    unmarked = renamed(unmarked, lambda key: re.sub(r"^new_fc\.", "classifier.", key), where)
    return _shifted("mobilenet", unmarked, place, official, where)


def _resnet(keys: dict[str, Any], official: bool, where: str) -> Layout:
    unmarked = renamed(keys, _without_mark, where)
    _depth(unmarked, where)  # ResNet-101 is shifted in every second block
    return _shifted("resnet", unmarked, shift_place(keys, False, where), official, where)


def _without_mark(key: str) -> str:
    """Return a key without what says that its block is shifted."""
    return key.replace(".net.", ".")


def _shifted(family: str, unmarked: Mapping[str, Any], place: str | None, official: bool, where: str) -> Layout:
    marked = official or place is not None
    return Layout(
        kind="official TSM / TSN" if marked else "plain",
        family=family,
        state=renamed(unmarked, _rename, where),
        shifted=place is not None if marked else None,
        shift_place=place,
    )


_POLICIES = r"\.policy_net\.|\.downsample0\."
_LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any], bool, str], Layout]], ...] = (
    ((r"^(features|layer1)\.", _POLICIES), _gated),
    ((r"^features\.",), _mobilenet),
    ((r"^layer1\.",), _resnet),
)
"""Layouts by the patterns that all have to stand among the keys; the first that fits is it."""


def renamed(state: Mapping[str, Any], rename: Callable[[str], str], where: str) -> dict[str, Any]:
    """Return `state` under other names; CheckpointError if two keys would get the same one."""
    found: dict[str, str] = {}
    for key in state:
        other = found.setdefault(rename(key), key)
        if other != key:
            raise CheckpointError(
                "the checkpoint holds one weight twice, under two names", where=where, why=f"{other} and {key}"
            )
    return {name: state[key] for name, key in found.items()}


def _rename(key: str) -> str:
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _refuse_variants(keys: Mapping[str, Any], where: str) -> None:
    for pattern, name in _VARIANTS:
        found = next((key for key in keys if re.search(pattern, key)), None)
        if found is not None:
            raise CheckpointError(
                "the checkpoint is of a model that dvexport has not", where=f"{where}: {found}", why=f"it is {name}",
                hint="write a factory for your own model: docs/adding-a-model.md",
            )  # fmt: skip


def _split_shared_tables(keys: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate `gate_fc0s.{2Cin}_{3Cmid}.*`, which repeat what stands under each block."""
    tables = {key: value for key, value in keys.items() if re.match(r"gate_fc[01]s\.", key)}
    return tables, {key: value for key, value in keys.items() if key not in tables}


def _check_shared_tables(tables: Mapping[str, Any], renamed: Mapping[str, Any], where: str) -> None:
    """Check that the blocks hold the same layers as the shared table, and all of them."""
    import torch

    read = set()
    for key, value in renamed.items():
        match = re.fullmatch(r"(.*)\.gates\.policy\.(fc[01])\.(weight|bias)", key)
        if not tables or match is None:
            continue
        block, layer, kind = match.groups()
        inputs = shape_of(renamed, f"{block}.gates.policy.fc0.weight", 2, where)[1]
        outputs = shape_of(renamed, f"{block}.gates.policy.fc1.weight", 2, where)[0]
        table_key = f"gate_{layer}s.{inputs}_{outputs}.{kind}"
        if table_key not in tables or not torch.equal(tables[table_key], value):
            raise CheckpointError(
                "the checkpoint contradicts itself: a shared policy net differs from its copy in a block",
                where=f"{where}: {table_key} and {key}",
            )
        read.add(table_key)
    unread = sorted(set(tables) - read)
    if unread:
        raise CheckpointError(
            "no block of the checkpoint reads a shared policy net", where=where, why=", ".join(unread[:3])
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
    facts["width"] = shape_of(state, "conv1.weight", 4, where)[0] / 64
    facts["classes"] = shape_of(state, "fc.weight", 2, where)[0]
    check_colours(state, "conv1.weight", where)
    policies = _blocks_with(state, "gates.policy.fc0.weight")
    masks = _blocks_with(state, "gates.mask.conv.weight")
    facts["channel_gates"], facts["tile_gates"] = bool(policies), bool(masks)
    if policies or masks:
        facts["enabled_stages"] = tuple(sorted({int(block[5]) - 1 for block in policies or masks}))
    if policies:
        facts |= _policy_facts(state, policies, where)
        facts["shared_policies"] = layout.shared
    if layout.shift_place == "block" and not policies:
        raise CheckpointError(
            "the checkpoint comes from AdaFuse's code, and has no policies",
            where=where,
            why="its blocks were gated by a fixed rule (--gate_threshold, --gate_random_hard_policy and others)",
            hint="dvexport has no such gates: write a factory for your own model, see docs/adding-a-model.md",
        )
    return facts | _shift_facts(layout)


def _shift_facts(layout: Layout) -> dict[str, Any]:
    """Return whether and where blocks are shifted, as far as the layout tells; not in which direction."""
    facts = {}
    if layout.shifted is not None:
        facts["shift"] = "bidirectional" if layout.shifted else "none"
    if layout.shift_place is not None and layout.family == "resnet":
        facts["shift_place"] = layout.shift_place
    return facts


_FLOWS = {10: "optical flow (2 channels of 5 frames)", 15: "differences of RGB frames (3 channels of 5)"}


def shape_of(state: Mapping[str, Any], key: str, axes: int, where: str) -> tuple[int, ...]:
    """Return the shape of a weight; CheckpointError if it is missing, empty or has not `axes` axes."""
    if key not in state:
        raise CheckpointError("the checkpoint lacks a layer", where=f"{where}: {key}")
    shape = tuple(int(size) for size in state[key].shape)
    if len(shape) != axes or 0 in shape:
        raise CheckpointError(
            "a layer of the checkpoint has another form", where=f"{where}: {key}", why=f"{shape} instead of {axes} axes"
        )
    return shape


def check_colours(state: Mapping[str, Any], key: str, where: str) -> None:
    """Raise CheckpointError unless the first layer, `key`, reads the three channels of an image."""
    channels = int(state[key].shape[1])
    if channels != 3:
        known = _FLOWS.get(channels)
        raise CheckpointError(
            "the checkpoint is of a model that does not read RGB frames",
            where=f"{where}: {key}",
            why=f"its first layer reads {channels} channels" + (f", as for {known}" if known else ""),
        )


def _depth(state: Mapping[str, Any], where: str) -> int:
    counts = tuple(
        len({key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")}) for stage in range(1, 5)
    )
    bottleneck = "layer1.0.conv3.weight" in state
    depth = _DEPTHS.get((counts, bottleneck))
    if depth is None or depth not in _SUPPORTED_DEPTHS:
        kind = f"it has {counts} {'bottleneck' if bottleneck else 'basic'} blocks"
        raise CheckpointError(
            "the checkpoint is of a ResNet that dvexport has not",
            where=where,
            why=f"{kind}, as a ResNet-{depth}" if depth else kind,
            hint="ResNet-18 and ResNet-50 are supported",
        )
    return depth


def _blocks_with(state: Mapping[str, Any], suffix: str) -> list[str]:
    matches = (re.fullmatch(rf"(layer[1-4]\.\d+)\.{re.escape(suffix)}", key) for key in state)
    return [match[1] for match in matches if match]


def _policy_facts(state: Mapping[str, Any], blocks: list[str], where: str) -> dict[str, Any]:
    """Return history, actions, hidden units and batch norm of the policies of `blocks`."""
    hidden, facts = {}, []
    for block in blocks:
        outputs, inputs, _, _ = shape_of(state, f"{block}.conv1.weight", 4, where)
        fc0 = shape_of(state, f"{block}.gates.policy.fc0.weight", 2, where)
        if f"{block}.gates.policy.fc1.weight" not in state:
            raise CheckpointError(
                "a policy net lacks its second layer",
                where=f"{where}: {block}",
                why="AdaFuse's --single_linear has none",
            )
        fc1 = shape_of(state, f"{block}.gates.policy.fc1.weight", 2, where)
        history, actions = fc0[1] / inputs, fc1[0] / outputs
        if (history, actions) not in ((1, 2), (2, 2), (2, 3)):
            raise CheckpointError(
                "a policy net has a shape that no option gives",
                where=f"{where}: {block}",
                why=f"it reads {history:g} frames and has {actions:g} outputs per channel",
                hint="granularity above 1 and gated channel ranges are not supported",
            )
        hidden[outputs] = fc0[0]
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


def resnet_name(facts: Mapping[str, Any]) -> str:
    """Return the zoo name of the ResNet that inferred options describe."""
    suffix = f"resnet{facts['depth']}"
    if facts["tile_gates"]:
        return f"dstep_{suffix}"
    if facts["channel_gates"]:
        last_only = facts["depth"] == 50 and facts.get("enabled_stages") == (3,)
        return f"adafuse_{suffix}_last" if last_only else f"adafuse_{suffix}"
    return f"tsm_{suffix}" if facts.get("shift") == "bidirectional" else f"tsn_{suffix}"


_MOBILE_LAYERS = ("features.0.0.weight", "features.2.conv.6.weight", "classifier.weight")


def infer_mobilenet(layout: Layout, where: str) -> dict[str, Any]:
    """Return the options of `MobileNetConfig` that names and shapes of the weights tell."""
    state = layout.state
    missing = next((key for key in _MOBILE_LAYERS if key not in state), None)
    if missing is not None:
        raise CheckpointError(
            "the checkpoint is no MobileNetV2 of the official TSM layout",
            where=where,
            why=f"it has no {missing}",
        )
    facts: dict[str, Any] = {"classes": shape_of(state, "classifier.weight", 2, where)[0]}
    widths = [w for w in (0.25, 0.5, 0.75, 1.0, 1.3, 1.4) if _mobile_widths(w) == _seen_widths(state)]
    if widths:
        facts["width"] = widths[0]
    shape_of(state, "features.0.0.weight", 4, where)
    check_colours(state, "features.0.0.weight", where)
    return facts | _shift_facts(layout)


def mobilenet_name(facts: Mapping[str, Any]) -> str | None:
    """Return the zoo name of the MobileNetV2 that inferred options describe, None if there is none."""
    by_shift = {"bidirectional": "tsm_mobilenetv2", "none": None, None: "tsm_online_mobilenetv2"}
    return by_shift[facts.get("shift")]


def _mobile_widths(width: float) -> tuple[int, ...]:
    return tuple(-(-int(c * width * 1000) // 8000) * 8 for c in (24, 32, 64, 96, 160, 320))


def _seen_widths(state: Mapping[str, Any]) -> tuple[int, ...]:
    last = [state.get(f"features.{i}.conv.6.weight") for i in (2, 4, 7, 11, 14, 17)]
    return tuple(len(weight) if weight is not None and weight.ndim else 0 for weight in last)
