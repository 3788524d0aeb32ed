"""Writes checkpoints in exactly the layouts that the official code saves.

Names follow the save code of AdaFuse (ops/batenet.py), D-STEP (ops/res_dynstc_net.py) and TSM
(ops/temporal_shift.py, online_demo/mobilenet_v2_tsm.py): DataParallel's prefix, `downsample0/1`,
`policy_net.gate_*`, `mask_s.atten_s`, the shared nets both in their table and under each block;
and mmcv's for Video-Swin.
"""

import re

import torch


def adafuse_keys(model):
    """state_dict of the official AdaFuse / D-STEP module that holds the weights of `model`."""
    keys = {}
    for name, value in model.state_dict().items():
        name = name.replace(".downsample.0.", ".downsample0.").replace(".downsample.1.", ".downsample1.")
        name = re.sub(r"\.gates\.policy\.(fc0|fc1|bn)\.", r".policy_net.gate_\1.", name)
        name = name.replace(".gates.mask.conv.", ".mask_s.atten_s.")
        if name.startswith("fc."):
            keys["module.new_fc." + name.removeprefix("fc.")] = value
        else:
            keys["module.base_model." + name] = value
    if model.config.shared_policies:
        for block in model.gated_blocks():
            policy = block.gates.policy
            shape = f"{policy.fc0.in_features}_{policy.fc1.out_features}"
            for index, layer in ((0, policy.fc0), (1, policy.fc1)):
                for part in ("weight", "bias"):
                    value = getattr(layer, part).detach()
                    keys[f"module.base_model.gate_fc{index}s.{shape}.{part}"] = value
    return keys


def tsm_keys(model):
    """state_dict of the official TSM / TSN on ResNet; what is shifted is wrapped as `.net`: conv1 or the block."""
    keys = {}
    for name, value in model.state_dict().items():
        if model.config.shift != "none":
            wrapped = r"(layer\d\.\d+\.conv1)\." if model.config.shift_place == "conv1" else r"(layer\d\.\d+)\."
            name = re.sub(wrapped, r"\1.net.", name)
        official = "new_fc." + name.removeprefix("fc.") if name.startswith("fc.") else "base_model." + name
        keys["module." + official] = value
    return keys


def mobilenet_offline_keys(model):
    """state_dict of the official offline TSM on MobileNetV2."""
    shifted = (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)
    keys = {}
    for name, value in model.state_dict().items():
        match = re.fullmatch(r"features\.(\d+)\.conv\.0\.(.*)", name)
        if match and int(match[1]) in shifted:
            name = f"features.{match[1]}.conv.0.net.{match[2]}"
        name = "base_model." + name if name.startswith("features.") else name.replace("classifier", "new_fc")
        keys["module." + name] = value
    return keys


def swin_keys(model):
    """state_dict as mmcv saves it: a backbone, a classification head, and the index tables beside the biases."""
    keys = {}
    for name, value in model.state_dict().items():
        keys[name.replace("head.", "cls_head.fc_cls.") if name.startswith("head.") else f"backbone.{name}"] = value
        if name.endswith("relative_position_bias_table"):
            index = name.replace("bias_table", "index")
            keys[f"backbone.{index}"] = model.get_buffer(index)
    return keys


def save(path, keys, *, wrapped=None, legacy=False, **beside):
    """Save as training code does: zip (torch >= 1.6) or legacy pickle, inside a dict or bare."""
    content = {wrapped: keys, **beside} if wrapped else keys
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path
